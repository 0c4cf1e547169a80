"""Scores of all edges from one backward pass: what each node sends, times the gradient at each reader.

    score[u -> v] = sum over positions of (w_u - a_u) . dm/dx_v

Gradients are kept where heads are small, at q, k and v; for some positions at a time they are pulled back through the
projection and its norm to what each head reads, nodes are multiplied out by their output weights, and the two are
contracted. Nothing of the size of edges times positions is formed.

For a head that reads y = (x - mean) / s * w + b through W, with g the gradient at W y, the gradient at x is
`(a - n (n . a) / d_model) / s`, with a = centred(w * W g) and n = (x - mean) / s; an RMSNorm has no mean.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mechjax.attribution.subject import Subject
from mechjax.base.errors import UnsupportedModelError
from mechjax.graph.build import Graph
from mechjax.graph.writes import Writes, recorded, sites
from mechjax.metrics.measured import itself
from mechjax.models.attention import Attention
from mechjax.models.contraction import contract, widened
from mechjax.models.decoder import Decoder
from mechjax.transform.captured import Activations
from mechjax.transform.gradients import value_and_grad_at
from mechjax.transform.transforms import capture

CHUNK_BYTES = 64e6  # vectors of all nodes and readers that are there at once: little, as a cache likes it


class Slopes(eqx.Module):
    """What a backward pass leaves: gradients at small sites, and the stream that enters each layer.

    Attributes:
        resid: Shape (layer, *place, d_model).
        heads: At q, k and v. Shapes (layer, *place, head, d_head).
        mlps: At what MLPs read; None without. Shape (layer, *place, d_model).
        last: At what the unembedding reads. Shape (*place, d_model).
    """

    resid: Array
    heads: list[Array]
    mlps: Array | None
    last: Array


def slopes(
    given: Subject, start: Float[Array, "batch pos d_model"]
) -> tuple[Float[Array, " batch"], Slopes, Writes]:
    """The metric, its gradients, and what nodes write, in the run that begins with `start`.

    Raises:
        UnsupportedModelError: Latent attention.
        ArgumentError: Activations that are not finite; the first site is named.
    """
    _attention(given.model)
    value, found, acts = _slopes(given, start)
    return value, found, recorded(start, acts)


def _attention(model: Decoder) -> Attention:
    if not isinstance(model.blocks.attn, Attention):
        raise UnsupportedModelError(
            "gradients at what each head reads are not implemented for latent attention. Exact scores are: "
            "mj.attribution.exact(...)."
        )
    return model.blocks.attn


@eqx.filter_jit
def _slopes(given: Subject, start: Array) -> tuple[Array, Slopes, Activations]:
    """One forward and one backward pass."""
    mlps, last = given.model.config.mlp != "none", f"blocks.{given.model.config.n_layers - 1}.hook_resid_post"
    gradients = value_and_grad_at(given, itself, ("q", "k", "v", *("mlp_in",) * mlps, last))
    clip, made = given.model.config.qkv_clip, sites(given.model)
    (value, grads), acts = capture(gradients, ("resid_pre", *made, *"qkv" * (clip is not None)))(start)
    heads = [grads[site] for site in "qkv"]
    if clip is not None:  # sites stand after it
        inside = [jnp.abs(acts[site]) < clip for site in "qkv"]
        heads = [jnp.where(here, g, 0) for here, g in zip(inside, heads, strict=True)]
    return value, Slopes(acts["resid_pre"], heads, grads.arrays.get("mlp_in"), grads["resid_post"][-1]), acts


@eqx.filter_jit
def edge_scores(
    given: Subject,
    found: Slopes,
    sent: Writes,
    graph: Graph,
    *,
    per_example: bool = False,
    chunk_size: int | None = None,
) -> Float[Array, "example edge"]:
    """Scores of all edges, from the gradients of a run.

    Args:
        given: The model.
        found: Its gradients.
        sent: What each node sends: w_u - a_u.
        graph: The graph.
        per_example: Whether examples stay apart; else it is their sum, and the first axis is 1.
        chunk_size: Positions that are contracted at once; None plans it from their memory.
    """
    batch, n_pos, d_model = sent.input.shape
    groups, length = (batch, n_pos) if per_example else (1, batch * n_pos)
    width = (len(graph.nodes) + len(graph.readers)) * d_model * sent.input.dtype.itemsize
    chunk = min(chunk_size or max(1, int(CHUNK_BYTES / width)), length)
    n = -(-length // chunk)
    weights, config = _weights(given.model), given.model.config
    axes = _before(sent, found)
    rows = jax.tree.map(lambda x, axis: _rows(x, axis, groups, n * chunk), (sent, found), axes)

    def example(i: Array) -> Array:
        def piece(total: list[Array], j: Array) -> tuple[list[Array], None]:
            here = lambda x, axis: lax.dynamic_slice_in_dim(x, i * n * chunk + j * chunk, chunk, axis)
            own, slopes = jax.tree.map(here, rows, axes)
            nodes = own.vectors(given.model)
            # merged, or XLA's CPU backend multiplies at half the rate
            times = lambda x: contract(
                "ui,vi->uv", nodes.reshape(len(nodes), -1), x.reshape(-1, nodes[0].size), config
            )
            return [a + times(x) for a, x in zip(total, _readers(given, weights, slopes), strict=True)], None

        sizes = [graph.n_layers * n for n in graph.reads.values()] + [1]
        zero = [jnp.zeros((len(graph.nodes), n), sent.input.dtype) for n in sizes]
        *layered, last = lax.scan(piece, zero, jnp.arange(n))[0]
        layered = [x.reshape(len(x), graph.n_layers, -1) for x in layered]
        return graph.flat(jnp.concatenate((jnp.concatenate(layered, -1).reshape(len(last), -1), last), -1))

    return lax.map(example, jnp.arange(groups))


def _before(sent: Writes, found: Slopes) -> tuple[Writes, Slopes]:
    """How many axes stand before batch and position: 1 for layers, else 0."""
    layered = lambda tree: jax.tree.map(lambda _: 1, tree)
    return (
        eqx.tree_at(lambda w: w.input, layered(sent), 0),
        eqx.tree_at(lambda s: s.last, layered(found), 0),
    )


def _rows(x: Array, axis: int, groups: int, length: int) -> Array:
    """Batch and position as one axis, each group filled up with zeros to `length`."""
    lead, own = x.shape[:axis], x.shape[axis + 2 :]
    x = x.reshape(*lead, groups, -1, *own)
    if (more := length - x.shape[axis + 1]) > 0:
        x = jnp.pad(x, [(0, more) if i == axis + 1 else (0, 0) for i in range(x.ndim)])
    return x.reshape(*lead, groups * length, *own)


def _weights(model: Decoder) -> list[Float[Array, "layer head d_head d_model"]]:
    """What pulls gradients at q, k and v back to the stream: the projections, times the norm's `w` and centred."""
    attn, norm, config = _attention(model), model.blocks.ln1, model.config

    def of(W: Array) -> Array:
        W = jnp.moveaxis(W, 1, -1)
        if norm is not None and norm.w is not None:
            W = W * (norm.w + jnp.asarray(config.norm_offset, norm.w.dtype))[:, None, None]
        return W - W.mean(-1, keepdims=True) if norm is not None and config.norm == "layer" else W

    return [of(W) for W in (attn.W_Q, attn.W_K, attn.W_V)]


def _readers(
    given: Subject, weights: list[Array], found: Slopes
) -> list[Float[Array, "*reader pos d_model"]]:
    """The gradient at what every reader reads: queries, keys, values, MLPs where there are any, and the unembedding."""
    config, scale, n = given.model.config, None, None
    if given.model.blocks.ln1 is not None:
        x = widened(found.resid)
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        scale = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
        n = (x / scale).astype(found.resid.dtype)

    def pulled(g: Array, W: Array) -> Array:
        if scale is not None:
            g = (g / scale[..., None]).astype(g.dtype)
        heads = contract("lphe,lhem->lhpm", g, W, config)
        if n is None or given.rules.norm == "frozen":
            return heads
        along = (heads * n[:, None]).sum(-1, keepdims=True) / n.shape[-1]
        return heads - along * n[:, None]

    read = [pulled(g, W) for g, W in zip(found.heads, weights, strict=True)]
    return [*read, *([] if found.mlps is None else [found.mlps]), found.last]
