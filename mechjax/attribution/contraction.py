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
from jaxtyping import Array, Float

from mechjax.attribution.subject import Subject
from mechjax.base.errors import UnsupportedModelError
from mechjax.graph.build import Graph
from mechjax.graph.writes import Writes, recorded, sites
from mechjax.models.attention import Attention
from mechjax.models.contraction import contract, widened
from mechjax.models.decoder import Decoder
from mechjax.transform.captured import Activations
from mechjax.transform.gradients import value_and_grad_at
from mechjax.transform.transforms import capture

CHUNK_BYTES = 128e6  # vectors of all nodes and readers that are there at once


class Slopes(eqx.Module):
    """What a backward pass leaves: gradients at small sites, and the stream that enters each layer.

    Attributes:
        resid: Shape (layer, *place, d_model).
        heads: At q, k and v, one after the other. Shape (layer, *place, head, d_head).
        mlps: At what MLPs read; None without. Shape (layer, *place, d_model).
        last: At what the unembedding reads. Shape (*place, d_model).
    """

    resid: Array
    heads: Array
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
    gradients = value_and_grad_at(given, _itself, ("q", "k", "v", *("mlp_in",) * mlps, last))
    clip, made = given.model.config.qkv_clip, sites(given.model)
    (value, grads), acts = capture(gradients, ("resid_pre", *made, *"qkv" * (clip is not None)))(start)
    heads = jnp.concatenate([grads[site] for site in "qkv"], -2)
    if clip is not None:  # sites stand after it
        heads = jnp.where(jnp.abs(jnp.concatenate([acts[site] for site in "qkv"], -2)) < clip, heads, 0)
    return value, Slopes(acts["resid_pre"], heads, grads.arrays.get("mlp_in"), grads["resid_post"][-1]), acts


def _itself(value: Array) -> Array:
    return value


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
    lead = (batch, n_pos) if per_example else (1, batch * n_pos)
    width = (len(graph.nodes) + len(graph.readers)) * d_model * sent.input.dtype.itemsize
    chunk = min(chunk_size or max(1, int(CHUNK_BYTES / width)), lead[1])
    pieces = jax.tree.map(lambda x, n: _pieces(x, n, lead, chunk), (sent, found), _before(sent, found))
    weights = _weights(given.model)

    def piece(total: list[Array], piece: tuple[Writes, Slopes]) -> tuple[list[Array], None]:
        nodes, readers = piece[0].vectors(given.model), _readers(given, weights, piece[1])
        scores = [contract("upm,vpm->uv", nodes, x, given.model.config) for x in readers]
        return [a + b for a, b in zip(total, scores, strict=True)], None

    def example(pieces: tuple[Writes, Slopes]) -> Array:
        heads = sum(graph.reads.values()) - graph.mlp
        sizes = (graph.n_layers * heads, graph.n_layers * graph.mlp + 1)
        zero = [jnp.zeros((len(graph.nodes), n), sent.input.dtype) for n in sizes]
        attention, others = jax.lax.scan(piece, zero, pieces)[0]
        own = attention.reshape(len(attention), graph.n_layers, heads)
        if graph.mlp:
            own = jnp.concatenate((own, others[:, :-1, None]), -1)
        return graph.flat(jnp.concatenate((own.reshape(len(own), -1), others[:, -1:]), -1))

    return jax.lax.map(example, pieces)


def _before(sent: Writes, found: Slopes) -> tuple[Writes, Slopes]:
    """How many axes stand before batch and position: 1 for layers, else 0."""
    layered = lambda tree: jax.tree.map(lambda _: 1, tree)
    return (
        eqx.tree_at(lambda w: w.input, layered(sent), 0),
        eqx.tree_at(lambda s: s.last, layered(found), 0),
    )


def _pieces(x: Array, before: int, lead: tuple[int, int], chunk: int) -> Array:
    """(layer, batch, pos, ...) as (group, piece, layer, position of the piece, ...), filled up with zeros."""
    own = x.shape[before + 2 :]
    n = -(-lead[1] // chunk)
    x = x.reshape(*x.shape[:before], *lead, *own)
    x = jnp.pad(x, [(0, n * chunk - lead[1]) if i == before + 1 else (0, 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[: before + 1], n, chunk, *own)
    return jnp.moveaxis(x, (before, before + 1), (0, 1))


def _weights(model: Decoder) -> Float[Array, "layer head d_head d_model"]:
    """What pulls gradients at q, k and v back to the stream: the projections, times the norm's `w` and centred."""
    attn, norm, config = _attention(model), model.blocks.ln1, model.config
    W = jnp.moveaxis(jnp.concatenate((attn.W_Q, attn.W_K, attn.W_V), -2), 1, -1)
    if norm is None:
        return W
    if norm.w is not None:
        W = W * (norm.w + jnp.asarray(config.norm_offset, norm.w.dtype))[:, None, None]
    return W - W.mean(-1, keepdims=True) if config.norm == "layer" else W


def _readers(given: Subject, weights: Array, found: Slopes) -> tuple[Array, Array]:
    """The gradient at what each head reads, layer by layer, and at what MLPs and the unembedding read.

    Shapes (reader, pos, d_model).
    """
    config, g, n = given.model.config, found.heads, None
    if given.model.blocks.ln1 is not None:
        x = widened(found.resid)
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        scale = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
        g, n = (g / scale[..., None]).astype(g.dtype), (x / scale).astype(g.dtype)
    heads = contract("lphe,lhem->lhpm", g, weights, config)
    if n is not None and given.rules.norm != "frozen":
        along = contract("lhpm,lpm->lhp", heads, n, config) / n.shape[-1]
        heads = heads - along[..., None] * n[:, None]
    others = found.last[None] if found.mlps is None else jnp.concatenate((found.mlps, found.last[None]))
    return heads.reshape(-1, *heads.shape[2:]), others
