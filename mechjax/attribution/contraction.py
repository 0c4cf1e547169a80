"""Scores of all edges from one backward pass: what each node sends, times the gradient at each reader.

    score[u -> v] = sum over positions of (w_u - a_u) . dm/dx_v

Gradients are kept where heads are small, at q, k and v; for a few positions at a time they are pulled back through the
projection and its norm to what each head reads, nodes are multiplied out by their output weights, and the two are
contracted. Nothing of the size of edges times positions is formed.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.attribution.measured import FromStart
from mechjax.attribution.subject import Subject
from mechjax.graph.build import Graph
from mechjax.graph.tap import READS, tapped
from mechjax.graph.writes import Writes
from mechjax.models.block import Block
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder
from mechjax.models.positions import Varying, varying
from mechjax.transform.context import wanting
from mechjax.transform.gradients import value_and_grad_at
from mechjax.transform.transforms import capture

CHUNK_BYTES = 256e6  # vectors of all nodes and readers that are there at once
HEADS = ("q", "k", "v")


class _Slopes(eqx.Module):
    """What a backward pass leaves: gradients at small sites, and the stream that enters each layer.

    Attributes:
        resid: Shape (layer, *place, d_model).
        heads: At q, k and v. Shapes (layer, *place, head, d_head).
        mlps: At what MLPs read; None without. Shape (layer, *place, d_model).
        last: At what the unembedding reads. Shape (*place, d_model).
    """

    resid: Array
    heads: tuple[Array, Array, Array]
    mlps: Array | None
    last: Array


@eqx.filter_jit
def edge_scores(
    given: Subject,
    start: Float[Array, "batch pos d_model"],
    sent: Writes,
    graph: Graph,
    *,
    per_example: bool = False,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "example edge"], Float[Array, " batch"]]:
    """Scores of all edges, and the metric, from the gradients of the run that begins with `start`.

    Args:
        given: The model, its metric and mask.
        start: What enters the first block.
        sent: What each node sends: w_u - a_u.
        graph: The graph.
        per_example: Whether examples stay apart; else it is their mean, and the first axis is 1.
        chunk_size: Positions that are contracted at once; None plans it from their memory.
    """
    value, slopes = _slopes(given, start)
    lead = (start.shape[0], start.shape[1]) if per_example else (1, start.shape[0] * start.shape[1])
    width = (len(graph.nodes) + len(graph.readers)) * start.shape[-1] * start.dtype.itemsize
    chunk = min(chunk_size or max(1, int(CHUNK_BYTES / width)), lead[1])
    pieces = jax.tree.map(lambda x, n: _pieces(x, n, lead, chunk), (sent, slopes), _before(sent, slopes))

    def piece(total: Array, piece: tuple[Writes, _Slopes]) -> tuple[Array, None]:
        nodes, readers = piece[0].vectors(given.model), _readers(given.model, piece[1])
        return total + contract("upm,vpm->uv", nodes, readers, given.model.config), None

    def example(pieces: tuple[Writes, _Slopes]) -> Array:
        zero = jnp.zeros((len(graph.nodes), len(graph.readers)), start.dtype)
        return graph.flat(jax.lax.scan(piece, zero, pieces)[0])

    found = jax.lax.map(example, pieces)
    return found if per_example else found / start.shape[0], value


def _slopes(given: Subject, start: Array) -> tuple[Array, _Slopes]:
    """One forward and one backward pass."""
    model, last = given.model, f"blocks.{given.model.config.n_layers - 1}.hook_resid_post"
    sites = (*HEADS, *("mlp_in",) * (given.intact.mlps is not None), last)
    gradients = value_and_grad_at(FromStart(model, given.measured), _itself, sites)
    (value, grads), acts = capture(gradients, "resid_pre")(start, given.mask)
    q, k, v = (grads[site] for site in HEADS)
    return value, _Slopes(acts["resid_pre"], (q, k, v), grads.arrays.get("mlp_in"), grads["resid_post"][-1])


def _itself(value: Array) -> Array:
    return value


def _before(sent: Writes, slopes: _Slopes) -> tuple[Writes, _Slopes]:
    """How many axes stand before batch and position: 1 for layers, else 0."""
    layered = lambda tree: jax.tree.map(lambda _: 1, tree)
    return (
        eqx.tree_at(lambda w: w.input, layered(sent), 0),
        eqx.tree_at(lambda s: s.last, layered(slopes), 0),
    )


def _pieces(x: Array, before: int, lead: tuple[int, int], chunk: int) -> Array:
    """(layer, batch, pos, ...) as (group, piece, layer, position of the piece, ...), filled up with zeros."""
    own = x.shape[before + 2 :]
    n = -(-lead[1] // chunk)
    x = x.reshape(*x.shape[:before], *lead, *own)
    x = jnp.pad(x, [(0, n * chunk - lead[1]) if i == before + 1 else (0, 0) for i in range(x.ndim)])
    x = x.reshape(*x.shape[: before + 1], n, chunk, *own)
    return jnp.moveaxis(x, (before, before + 1), (0, 1))


def _readers(model: Decoder, slopes: _Slopes) -> Float[Array, "reader pos d_model"]:
    """The gradient at what each reader reads, in the order of `graph.readers`."""
    b = model.blocks
    attention = Block(b.ln1, b.attn, None, None, None, None, None)
    layers = jnp.arange(model.config.n_layers, dtype=jnp.int32)

    def of_layer(xs: tuple[Block, Varying, Array, Array, tuple[Array, Array, Array]]) -> Array:
        pulled = _pull(model, *xs)
        return jnp.concatenate([jnp.moveaxis(x, -2, 0) for x in pulled])

    with wanting(READS):
        own = jax.lax.map(of_layer, (attention, varying(model.config), layers, slopes.resid, slopes.heads))
    if slopes.mlps is not None:
        own = jnp.concatenate((own, slopes.mlps[:, None]), 1)
    return jnp.concatenate((own.reshape(-1, *slopes.last.shape), slopes.last[None]))


def _pull(
    model: Decoder,
    block: Block,
    here: Varying,
    layer: Array,
    resid: Array,
    slopes: tuple[Array, Array, Array],
) -> list[Array]:
    """Gradients at q, k and v, pulled back to what each head reads: position by position, without attention."""
    sequence = model.arrange(resid.shape[-2])

    def project(moves: list[Array]) -> tuple[Array, ...]:
        seen: dict[str, Array] = {}
        changes = {f"{site}_input": lambda x, m=m: x + m for site, m in zip(HEADS, moves, strict=True)}
        block(resid, sequence, here, layer, model.config, mark=tapped(lambda x, _: x, changes, seen))
        return tuple(seen[site] for site in HEADS)

    zeros = [jnp.zeros((*g.shape[:-1], resid.shape[-1]), resid.dtype) for g in slopes]
    return jax.vjp(project, zeros)[1](slopes)[0]
