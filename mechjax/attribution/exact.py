"""Exact patching of edges and nodes: the oracle of every approximation. What does this edge do for the metric?

    score[u -> v] = m(f) - m(f with x_v <- x_v + a_u - w_u)            one edge at a time, everything after it run again

where `w_u` is what node u writes in the clean run, `a_u` what it writes when ablated, `x_v` what reader v reads, and m
the metric. Positive where the edge helps the metric. A node's score has all its edges ablated at once.

Reference: Wang et al. (2022), arXiv:2211.00593, section 3 (path patching); Conmy et al. (2023), arXiv:2304.14997, whose
single step this is. MIB (arXiv:2504.13151) calls it EActP.
Differs from the papers: other edges keep the run as it is; nothing is frozen. Where a norm stands after attention, a
head's write is its share of the norm's output at the scale of its own run (`mechjax.graph.forward`).
Cost: an edge into layer l costs layers l to L. Memory: `chunk_size` edges at a time, by default as many as fit in 256
MB of activations, and one stream per node.
Exact: always.    Misleads when: edges are redundant (each one alone does nothing), or the metric saturates.
"""

import dataclasses
import itertools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mechjax.attribution.scores import Reduce, Scores, reduced
from mechjax.attribution.subject import Ablation, Subject, subject
from mechjax.base.errors import ArgumentError
from mechjax.graph.build import Graph
from mechjax.graph.forward import masked_stream
from mechjax.graph.tap import READS, tapped
from mechjax.graph.writes import Blocks, Writes, recorded, sites
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder
from mechjax.models.marks import marks_of
from mechjax.models.resume import resume
from mechjax.models.room import runs_that_fit
from mechjax.transform.captured import Activations
from mechjax.transform.context import wanting
from mechjax.transform.transforms import capture

CHUNK_BYTES = 256e6


def exact(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    over: Literal["edge", "node"] = "edge",
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean",
    chunk_size: int | None = None,
) -> Scores:
    """Ablate every edge, or every node, one at a time, and read the metric.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`: one number per example.
        graph: The model's graph, `mj.graph.build(model)`.
        over: "edge" or "node".
        ablation: What stands in for what a node writes: "resample" (what it writes on `corrupt`), "zero", "mean" over
            `reference` and its positions, or "mean_per_pos".
        reference: The prompts of a mean.
        reduce: "mean" over examples, signed; "abs_of_mean", its size; "mean_of_abs", the mean of the examples' sizes.
        chunk_size: Edges that run at once; None plans it from their memory.

    Returns:
        The scores, in the order of `graph.edges` or `graph.nodes`.

    Raises:
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
    """
    if over not in ("edge", "node"):
        raise ArgumentError(f"over={over!r}: expected 'edge' or 'node'.")
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one edge must run at once.")
    given = subject(model, clean, corrupt, metric, graph, ablation, reference, reduce)
    chunk = chunk_size or runs_that_fit(CHUNK_BYTES, given.model, given.start.shape[:2], heads_apart=True)
    base, resid, acts = _clean_run(given)
    intact = recorded(given.start, acts)
    if over == "node":
        found = _of_nodes(given, graph, chunk)
    else:
        found = jnp.zeros((len(graph.table), *base.shape), base.dtype)
        sent = _sent(given, intact)
        for site, layers, cells in _cells(graph, chunk):
            nodes, heads = jnp.asarray(cells[..., 0]), jnp.asarray(cells[..., 1])
            ran = _of_edges(given, resid, sent, site, jnp.asarray(layers), nodes, heads)
            found = found.at[cells[..., 2].ravel()].set(ran.reshape(-1, *base.shape), mode="drop")
    effect = base - found
    return Scores(reduced(effect.T, reduce), base, graph, (over,), "exact", ablation, reduce)


def _cells(graph: Graph, chunk: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Chunks of edges into readers of one site and one layer: (site, layer of each chunk, (node, head, edge) of each).

    The last chunk of a layer is filled up with edges that are no edge.
    """
    starts = np.concatenate([[0], np.cumsum(graph.before)])
    kinds = [(site, head) for site, n in graph.reads.items() for head in range(n)]
    found: dict[str, list[tuple[int, np.ndarray]]] = {}
    last = len(graph.readers) - 1
    for layer, site in itertools.product(range(graph.n_layers), graph.reads):
        readers = [(layer * len(kinds) + i, h) for i, (s, h) in enumerate(kinds) if s == site]
        found.setdefault(site, []).append((layer, _into(readers, graph, starts)))
    found["logits"] = [(graph.n_layers, _into([(last, 0)], graph, starts))]
    chunks = []
    for site, groups in found.items():
        size = min(chunk, max(len(cells) for _, cells in groups))
        layers, filled = [], []
        for layer, cells in groups:
            n = -(-len(cells) // size)
            none = np.tile(np.array([0, 0, len(graph.table)], np.int32), (n * size - len(cells), 1))
            filled += [np.concatenate([cells, none]).reshape(n, size, 3)]
            layers += [layer] * n
        chunks.append((site, np.array(layers, np.int32), np.concatenate(filled)))
    return chunks


def _into(readers: list[tuple[int, int]], graph: Graph, starts: np.ndarray) -> np.ndarray:
    """(node, head, edge) of every edge into some readers, which are given with their heads."""
    rows = [(u, head, starts[reader] + u) for reader, head in readers for u in range(graph.before[reader])]
    return np.array(rows, np.int32)


@eqx.filter_jit
def _clean_run(given: Subject) -> tuple[Array, Array, Activations]:
    """The clean metric; the stream that enters each layer and, last, the unembedding; and what writes are made of."""
    last, acts = capture(Blocks(given.model), ("resid_pre", *sites(given.model)))(given.start, given.mask)
    return given.value(last), jnp.concatenate((acts["resid_pre"], last[None])), acts


@eqx.filter_jit
def _sent(given: Subject, intact: Writes) -> Array:
    """What the ablation of each node adds to what its readers read."""
    return jax.tree.map(jnp.subtract, given.ablated, intact).vectors(given.model)


@eqx.filter_jit
def _of_edges(
    given: Subject, resid: Array, sent: Array, site: str, layers: Array, nodes: Array, heads: Array
) -> Array:
    """The metric with one edge ablated, for chunks of edges, each of one layer, which may be traced."""
    model, config = given.model, given.model.config
    sequence = model.arrange(resid.shape[-2], mask=given.mask)

    def cell(layer: Array, node: Array, head: Array) -> Array:
        before = resid[layer]
        if site == "logits":
            return given.value(before + sent[node])

        def moved(x: Array) -> Array:
            if site == "mlp_in":
                return x + sent[node]
            here = jnp.arange(x.shape[-2], dtype=head.dtype)[:, None] == head
            return x + jnp.where(here, sent[node][..., None, :], 0)

        with wanting(READS & {site}):  # this layer's heads read apart, later ones need not
            after = model.block(before, layer, sequence, tapped(marks_of(layer, config), {site: moved}, {}))
        return given.value(resume(model, layer + 1).blocks(after, mask=given.mask))

    def chunk(xs: tuple[Array, Array, Array]) -> Array:
        layer, nodes, heads = xs
        return jax.vmap(lambda node, head: cell(layer, node, head))(nodes, heads)

    return jax.lax.map(chunk, (layers, nodes, heads))


@eqx.filter_jit
def _of_nodes(given: Subject, graph: Graph, chunk: int) -> Array:
    """The metric with all edges of one node ablated, for every node."""
    own = dataclasses.replace(graph, grouped=True)  # the model of `given` has keys as the graph has them
    of = jnp.asarray(graph.table[:, 0])

    def ablate(node: Array) -> Array:
        kept = (of != node).astype(given.start.dtype)
        resid = masked_stream(given.model, given.start, kept, given.ablated, graph=own, mask=given.mask)
        return given.value(resid)

    return jax.lax.map(ablate, jnp.arange(len(graph.nodes)), batch_size=min(chunk, len(graph.nodes)))
