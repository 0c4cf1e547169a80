"""Scores of all edges from one backward pass: what each node sends, times the gradient at each reader.

    score[u -> v] = sum over positions of (w_u - a_u) . dm/dx_v

Gradients are kept where heads are small, at q, k and v; for some positions at a time they are pulled back through the
projection and its norm to what each head reads, nodes are multiplied out by their output weights, and the two are
contracted. Nothing of the size of edges times positions is formed. Where spans are apart, each is contracted by itself;
units of MLPs are readers whose gradient comes from that at their value.

For a head that reads y = (x - mean) / s * w + b through W, with g the gradient at W y, the gradient at x is
`(a - n (n . a) / d_model) / s`, with a = centred(w * W g) and n = (x - mean) / s; an RMSNorm has no mean.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.attribution.subject import Subject
from mechjax.base.errors import UnsupportedModelError
from mechjax.graph.units import directions, scaled, units_of, values_apart
from mechjax.graph.writes import Writes, recorded, sites
from mechjax.metrics.measured import itself
from mechjax.models.attention import Attention
from mechjax.models.contraction import contract, widened
from mechjax.models.decoder import Decoder
from mechjax.models.quantized import full
from mechjax.models.room import at_once
from mechjax.transform.captured import Activations
from mechjax.transform.gradients import value_and_grad_at
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture

CHUNK_BYTES = 64e6  # vectors of all nodes and readers that are there at once: little, as a cache likes it


class Slopes(eqx.Module):
    """What a backward pass leaves: gradients at small sites, and the stream that enters each layer.

    Attributes:
        resid: Shape (layer, *place, d_model).
        heads: At q, k and v. Shapes (layer, *place, head, d_head).
        mlps: At what MLPs read; None without. Shape (layer, *place, d_model).
        last: At what the unembedding reads. Shape (*place, d_model).
        units: What units of MLPs need; None where none are nodes.
    """

    resid: Array
    heads: list[Array]
    mlps: Array | None
    last: Array
    units: "UnitSlopes | None" = None


class UnitSlopes(eqx.Module):
    """Of units of MLPs.

    Attributes:
        mid: The stream that MLPs read. Shape (layer, *place, d_model).
        values: Gradients at units' values, before the norm after the MLP. Shape (layer, *place, unit).
    """

    mid: Array
    values: Array


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
    return value, found, recorded(given.model, start, acts, given.graph)


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
    model, units = given.model, bool(given.graph.units)
    mlps, last = model.config.mlp != "none", f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    asked = ("q", "k", "v", *("mlp_in",) * mlps, *("mlp_out",) * units, last)
    gradients = value_and_grad_at(given, itself, asked)
    clip, made = model.config.qkv_clip, sites(model, given.graph)
    (value, grads), acts = capture(gradients, ("resid_pre", *made, *"qkv" * (clip is not None)))(start)
    heads = [grads[site] for site in "qkv"]
    if clip is not None:  # sites stand after it
        inside = [jnp.abs(acts[site]) < clip for site in "qkv"]
        heads = [jnp.where(here, g, 0) for here, g in zip(inside, heads, strict=True)]
    of_units = _at_values(given, grads["mlp_out"], acts) if units else None
    found = Slopes(acts["resid_pre"], heads, grads.arrays.get("mlp_in"), grads["resid_post"][-1], of_units)
    return value, found, acts


def _at_values(given: Subject, at_written: Array, acts: Activations) -> UnitSlopes:
    """Gradients at the values of units, from those at what MLPs write."""
    graph, config = given.graph, given.model.config

    def of_layer(xs: tuple[Any, Array, Array, Array | None]) -> Array:
        block, slope, index, scale = xs
        found = contract("...m,km->...k", slope, directions(block, index, config), config)
        return scaled(found, block, scale)

    index, scales = units_of(graph.units, graph.n_units), acts.arrays.get("ln2_post.scale")
    return UnitSlopes(acts["mlp_in"], lax.map(of_layer, (given.model.blocks, at_written, index, scales)))


def edge_scores(
    given: Subject,
    found: Sequence[tuple[float, Slopes]],
    sent: Writes,
    *,
    per_example: bool = False,
    chunk_size: int | None = None,
) -> Float[Array, "example edge"]:
    """Scores of all edges, from the gradients of one run or of several.

    Args:
        given: The model, its graph and where spans are.
        found: Each run's share, which sum to 1, and its gradients.
        sent: What each node sends: w_u - a_u.
        per_example: Whether examples stay apart; else it is their sum, and the first axis is 1.
        chunk_size: Positions that are contracted at once; None plans it from their memory.
    """
    graph, (batch, n_pos, d_model) = given.graph, sent.input.shape
    n_spans, n_examples = max(len(graph.spans), 1), batch if per_example else 1
    rows, length = None, batch * n_pos // n_examples
    if given.spans is not None:
        rows, length = _rows_of_spans(given.spans, n_spans, n_examples)
    width = (len(graph.nodes) + len(graph.readers)) * d_model * sent.input.dtype.itemsize
    chunk = min(chunk_size or at_once(CHUNK_BYTES, width), length)
    weights = jnp.asarray([weight for weight, _ in found], sent.input.dtype)
    runs = [slopes for _, slopes in found]
    return _contracted(given, runs, weights, sent, rows, (n_examples, n_spans), length, chunk)


def _rows_of_spans(spans: Int[Array, "batch pos"], n_spans: int, n_examples: int) -> tuple[Array, int]:
    """The places, of batch and position together, that each span of each example has, and the most that one has.

    What a span has not is filled up with a place that there is not.
    """
    inside = spans.reshape(n_examples, 1, -1) == jnp.arange(n_spans, dtype=spans.dtype)[:, None]
    length = int(inside.sum(-1).max()) if is_concrete(inside) else inside.shape[-1]
    order = jnp.argsort(~inside, -1, stable=True)[..., : max(length, 1)]
    own = jnp.take_along_axis(inside, order, -1)
    first = (jnp.arange(n_examples, dtype=order.dtype) * inside.shape[-1])[:, None, None]
    return jnp.where(own, order + first, spans.size).reshape(-1, order.shape[-1]), max(length, 1)


@eqx.filter_jit
def _contracted(
    given: Subject, runs: list[Slopes], shares: Float[Array, " run"], sent: Writes, rows: Array | None,
    groups: tuple[int, int], length: int, chunk: int,
) -> Float[Array, "example edge"]:  # fmt: skip
    """Scores of each group of places: those of an example (or of all), at a span."""
    graph, config, n = given.graph, given.model.config, -(-length // chunk)
    weights = _weights(given.model)
    found = jax.tree.map(lambda *x: jnp.stack(x), *runs)
    leads = (sent.mapped(lambda _, lead: lead), _leads(found))
    n_groups = groups[0] * groups[1]
    placed = jax.tree.map(lambda x, lead: _rows(x, lead, rows, n_groups, n * chunk), (sent, found), leads)

    def group(i: Array) -> Array:
        def piece(total: list[Array], j: Array) -> tuple[list[Array], None]:
            here = lambda x, lead: lax.dynamic_slice_in_dim(x, i * n * chunk + j * chunk, chunk, lead)
            own, runs = jax.tree.map(here, placed, leads)
            nodes = own.vectors(given.model, graph)
            # merged, or XLA's CPU backend multiplies at half the rate
            times = lambda x: contract(
                "ui,vi->uv", nodes.reshape(len(nodes), -1), x.reshape(-1, nodes[0].size), config
            )
            read = _summed(given, weights, runs, shares)
            return [a + times(x) for a, x in zip(total, read, strict=True)], None

        sizes = [graph.n_layers * n for n in graph.reads.values()] + [1]
        zero = [jnp.zeros((len(graph.nodes), n), sent.input.dtype) for n in sizes]
        *layered, last = lax.scan(piece, zero, jnp.arange(n))[0]
        layered = [x.reshape(len(x), -1, graph.n_layers).swapaxes(1, 2) for x in layered]
        return jnp.concatenate((jnp.concatenate(layered, -1).reshape(len(last), -1), last), -1)

    tables = lax.map(group, jnp.arange(n_groups))
    tables = tables.reshape(*groups, *tables.shape[1:])
    return jax.vmap(lambda x: graph.flat(jnp.moveaxis(x, 0, -1)))(tables)


def _leads(found: Slopes) -> Slopes:
    """How many axes stand before batch and position: that of runs and, but for one array, that of layers."""
    return eqx.tree_at(lambda s: s.last, jax.tree.map(lambda _: 2, found), 1)


def _rows(x: Array, lead: int, rows: Array | None, n_groups: int, length: int) -> Array:
    """Batch and position as one axis: every group's places, filled up with zeros to `length`."""
    before, own = x.shape[:lead], x.shape[lead + 2 :]
    if rows is None:
        x = x.reshape(*before, n_groups, -1, *own)
    else:
        x = x.reshape(*before, -1, *own)
        x = jnp.take(x, rows, axis=lead, mode="fill", fill_value=0)
    if (more := length - x.shape[lead + 1]) > 0:
        x = jnp.pad(x, [(0, more) if i == lead + 1 else (0, 0) for i in range(x.ndim)])
    return x.reshape(*before, n_groups * length, *own)


def _weights(model: Decoder) -> list[Float[Array, "head layer d_head d_model"]]:
    """What pulls gradients at q, k and v back to the stream: the projections, times the norm's `w` and centred."""
    attn, norm, config = full(_attention(model)), model.blocks.ln1, model.config

    def of(W: Array) -> Array:
        W = W.transpose(2, 0, 3, 1)
        if norm is not None and norm.w is not None:
            W = W * (norm.w + jnp.asarray(config.norm_offset, norm.w.dtype))[:, None]
        return W - W.mean(-1, keepdims=True) if norm is not None and config.norm == "layer" else W

    return [of(W) for W in (attn.W_Q, attn.W_K, attn.W_V)]


def _summed(
    given: Subject, weights: list[Array], runs: Slopes, shares: Float[Array, " run"]
) -> list[Float[Array, "*reader pos d_model"]]:
    """The gradient at what every reader reads, each run by its share, in one sum: then one product does for all."""
    first = jax.tree.map(lambda x: x[0], runs)
    if len(shares) == 1:  # whose share is 1
        return _readers(given, weights, first)

    def run(total: list[Array], xs: tuple[Array, Slopes]) -> tuple[list[Array], None]:
        read = _readers(given, weights, xs[1])
        return [a + xs[0] * x for a, x in zip(total, read, strict=True)], None

    shapes = eqx.filter_eval_shape(_readers, given, weights, first)
    return lax.scan(run, [jnp.zeros(x.shape, x.dtype) for x in shapes], (shares, runs))[0]


def _readers(
    given: Subject, weights: list[Array], found: Slopes
) -> list[Float[Array, "*reader pos d_model"]]:
    """The gradient at what readers read: queries, keys, values, units of MLPs, MLPs (if any), and the unembedding.

    Heads (and units) stand before layers: both as one axis are then still split over a mesh, where heads are.
    """
    config, scale, n = given.model.config, None, None
    if given.model.blocks.ln1 is not None:
        x = widened(found.resid)
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        scale = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + config.norm_eps)
        n = (x / scale).astype(found.resid.dtype)

    def pulled(g: Array, W: Array) -> Array:
        if scale is not None:
            g = (g / scale[..., None]).astype(g.dtype)
        heads = contract("hlpe,hlem->hlpm", jnp.moveaxis(g, 2, 0), W, config)
        if n is None or given.rules.norm == "frozen":
            return heads
        along = (heads * n).sum(-1, keepdims=True) / n.shape[-1]
        return heads - along * n

    read = [pulled(g, W) for g, W in zip(found.heads, weights, strict=True)]
    if found.mlps is None:
        return [*read, found.last]
    if found.units is None:
        return [*read, found.mlps, found.last]
    units = _units(given, found.units)
    return [*read, jnp.moveaxis(units, -2, 0), found.mlps - units.sum(-2), found.last]


def _units(given: Subject, found: UnitSlopes) -> Float[Array, "layer pos unit d_model"]:
    """The gradient at what every unit of an MLP reads."""
    graph, config = given.graph, given.model.config

    def of_layer(xs: tuple[Any, Array, Array, Array]) -> Array:
        block, mid, slope, index = xs
        apart = jnp.broadcast_to(mid[:, None], (*slope.shape, mid.shape[-1]))
        return jax.vjp(lambda x: values_apart(block, x, index, config), apart)[1](slope)[0]

    index = units_of(graph.units, graph.n_units)
    return lax.map(of_layer, (given.model.blocks, found.mid, found.values, index))
