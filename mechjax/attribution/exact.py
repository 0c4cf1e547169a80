"""Exact patching of edges and nodes: the oracle of every approximation. What does this edge do for the metric?

    score[u -> v] = m(f) - m(f with x_v <- x_v + a_u - w_u)            one edge at a time, everything after it run again

where `w_u` is what node u writes in the clean run, `a_u` what it writes when ablated, `x_v` what reader v reads, and m
the metric. Positive where the edge helps the metric. A node's score has all its edges ablated at once.

Reference: Wang et al. (2022), arXiv:2211.00593, section 3 (path patching); Conmy et al. (2023), arXiv:2304.14997, whose
single step this is. MIB (arXiv:2504.13151) calls it EActP.
Differs from the papers: other edges keep the run as it is; nothing is frozen. Where a norm stands after attention, a
head's write is its share of the norm's output at the scale of its own run (`mechjax.graph.forward`). A graph may take
units of MLPs apart, and positions: an edge at a position is ablated there alone.
Cost: an edge into layer l costs layers l to L - 1, of the last of them keys and values and what the metric reads; no
more where only some `edges` are asked for. Memory: `chunk_size` edges at a time, by default as many as fit in 256
MB of activations, and one stream per node.
Exact: always.    Misleads when: edges are redundant (each one alone does nothing), or the metric saturates.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.attribution.scores import Reduce, Scores, reduced
from mechjax.attribution.subject import Ablation, Subject, clean_run, subject
from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.graph.build import Graph
from mechjax.graph.tap import READS, tapped
from mechjax.graph.units import directions, scaled, units_of, values
from mechjax.graph.writes import Writes, recorded
from mechjax.metrics.metric import Metric
from mechjax.models.attention import Attention
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder
from mechjax.models.marks import marks_of
from mechjax.models.needs import needs_decoder
from mechjax.models.room import backs_off, runs_that_fit
from mechjax.transform.context import wanting

CHUNK_BYTES = 256e6


@needs_decoder("graph")
@on_any_mesh
@backs_off
def exact(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    over: Literal["edge", "node"] = "edge",
    edges: Sequence[str] | Sequence[int] | Array | np.ndarray | None = None,
    positions: Mapping[str, Any] | None = None,
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
        edges: Which edges, by name or by their place in `graph.edges`; None for all. The others' scores are NaN, and
            `.compare` leaves them out.
        positions: Where the graph's spans are, where these have names: for each, one position per example, several, or
            a mask (batch, pos).
        ablation: What stands in for what a node writes: "resample" (what it writes on `corrupt`), "zero", "mean" over
            `reference` and its positions, or "mean_per_pos".
        reference: The prompts of a mean.
        reduce: "mean" over examples, signed; "abs_of_mean", its size; "mean_of_abs", the mean of the examples' sizes.
        chunk_size: Edges that run at once; None plans it from their memory.

    Returns:
        The scores, in the order of `graph.edges`, or of `graph.places`: nodes, at each span where there are any.

    Raises:
        ArgumentError: An argument outside its range, an edge that is none, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
        ShapeError: Prompts of another length than the graph's positions.
    """
    if over not in ("edge", "node"):
        raise ArgumentError(f"over={over!r}: expected 'edge' or 'node'.")
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one edge must run at once.")
    if edges is not None and over == "node":
        raise ArgumentError("edges= chooses edges, and over='node' scores nodes: leave one of them out.")
    chosen = np.arange(len(graph.table)) if edges is None else _chosen(edges, graph)
    given = subject(model, clean, corrupt, metric, graph, ablation, reference, reduce, positions=positions)
    apart = over == "node" or not isinstance(given.model.blocks.attn, Attention)
    chunk = chunk_size or runs_that_fit(CHUNK_BYTES, given.model, given.start.shape[:2], heads_apart=apart)
    base, last, acts = clean_run(given, ("resid_pre",))
    intact = recorded(given.model, given.start, acts, given.graph)
    if over == "node":
        found = _of_nodes(given, chunk)
    else:
        resid = jnp.concatenate((acts["resid_pre"], last[None]))
        own = _Clean(resid, acts.arrays.get("mlp_in"), acts.arrays.get("ln2_post.scale"))
        found = jnp.full((len(graph.table), *base.shape), jnp.nan, base.dtype)
        sent = _sent(given, intact)
        for site, layers, cells in _cells(graph, chosen, chunk):
            ran = _of_edges(given, own, sent, site, jnp.asarray(layers), jnp.asarray(cells[..., :3]))
            found = found.at[cells[..., 3].ravel()].set(ran.reshape(-1, *base.shape), mode="drop")
    effect = base - found
    return Scores(reduced(effect.T, reduce), base, graph, (over,), "exact", ablation, reduce)


def _chosen(edges: Any, graph: Graph) -> np.ndarray:
    """The places of some edges."""
    if isinstance(edges, str):
        edges = (edges,)
    if len(edges) == 0:
        raise ArgumentError("edges= is empty: name at least one edge, or leave it out for all.")
    if isinstance(edges[0], str):
        return np.array([graph.number(name) for name in edges])
    found = np.asarray(edges)
    n = len(graph.table)
    if found.dtype == bool and found.shape == (n,):
        return np.flatnonzero(found)
    if not np.issubdtype(found.dtype, np.integer) or found.ndim != 1 or ((found < 0) | (found >= n)).any():
        raise ArgumentError(
            f"edges= of shape {found.shape} and type {found.dtype}: give names such as `{graph.edges[0]}`, places from "
            f"0 to {n - 1}, or a mask of all {n} edges."
        )
    return found


def _cells(graph: Graph, chosen: np.ndarray, chunk: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Chunks of edges into readers of one site and one layer: (site, layer of each chunk, cells of each chunk).

    A cell is (node, which reader of the layer's, span, edge). The last chunk of a layer is filled up with edges that
    are no edge.
    """
    kinds = [(site, i) for site, n in graph.reads.items() for i in range(n)]
    node, reader, span = graph.table[chosen].T
    layer, kind = np.divmod(graph.columns[reader], len(kinds))
    last = layer == graph.n_layers
    of_kind = np.array([i for _, i in kinds])[kind] * ~last
    cells = np.column_stack([node, of_kind, span, chosen]).astype(np.int32)
    chunks = []
    for site in (*graph.reads, "logits"):
        here = last if site == "logits" else ~last & np.array([s == site for s, _ in kinds])[kind]
        groups = [(at, cells[here & (layer == at)]) for at in np.unique(layer[here])]
        if not groups:
            continue
        size = min(chunk, max(len(own) for _, own in groups))
        layers, filled = [], []
        for at, own in groups:
            n = -(-len(own) // size)
            none = np.tile(np.array([0, 0, 0, len(graph.table)], np.int32), (n * size - len(own), 1))
            filled += [np.concatenate([own, none]).reshape(n, size, 4)]
            layers += [at] * n
        chunks.append((site, np.array(layers, np.int32), np.concatenate(filled)))
    return chunks


class _Clean(eqx.Module):
    """The clean run.

    Attributes:
        resid: The stream that enters each layer and, last, the unembedding.
        mid: What MLPs read; None where no unit of theirs is a node.
        scale: That of norms after MLPs; None where there are none, or no unit is a node.
    """

    resid: Float[Array, "stream batch pos d_model"]
    mid: Float[Array, "layer batch pos d_model"] | None
    scale: Float[Array, "layer batch pos one"] | None


@eqx.filter_jit
def _sent(given: Subject, intact: Writes) -> Array:
    """What the ablation of each node adds to what its readers read."""
    return jax.tree.map(jnp.subtract, given.ablated, intact).vectors(given.model, given.graph)


@eqx.filter_jit
def _of_edges(
    given: Subject, clean: _Clean, sent: Array, site: str, layers: Array, cells: Int[Array, "chunk cell 3"]
) -> Array:
    """The metric with one edge ablated, for chunks of edges, each of one layer, which may be traced."""
    model, config = given.model, given.model.config
    sequence = model.arrange(clean.resid.shape[-2], mask=given.mask)
    # One head alone reads something else: its query, key or value is formed anew, those of all others are the run's.
    alone = site in ("q_input", "k_input", "v_input") and isinstance(model.blocks.attn, Attention)
    made = site[0] if alone else None

    def cell(layer: Array, node: Array, which: Array, span: Array) -> Array:
        before, added = clean.resid[layer], sent[node]
        if given.spans is not None:
            added = jnp.where((given.spans == span)[..., None], added, 0)
        if site == "logits":
            return given.value(before + added)

        def moved(x: Array) -> Array:
            """What the reader reads, or (`made`) what its head makes of that."""
            if made is not None:
                head = _of_head(given, layer, site[0], which, before + added)
                return jax.lax.dynamic_update_index_in_dim(x, head, which, -2)
            if site == "mlp_in":
                return x + added
            here = jnp.arange(x.shape[-2], dtype=which.dtype)[:, None] == which
            return x + jnp.where(here, added[..., None, :], 0)

        if site == "units":
            own = jnp.arange(given.graph.n_units, dtype=which.dtype) == which
            after = clean.resid[layer + 1] + _of_units(given, clean, layer, added, own)
        else:
            with wanting(READS & {site} if made is None else frozenset()):
                mark = tapped(marks_of(layer, config), {made or site: moved}, {})
                after = model.block(before, layer, sequence, mark)
            if site == "mlp_in" and given.graph.units:  # they keep to what they read
                every = jnp.ones(given.graph.n_units, bool)
                after = after - _of_units(given, clean, layer, added, every)
        return given.measured.of_rest(model, layer + 1, after, given.mask)

    def chunk(xs: tuple[Array, Array]) -> Array:
        layer, own = xs
        return jax.vmap(lambda node, which, span: cell(layer, node, which, span))(*own.T)

    return jax.lax.map(chunk, (layers, cells))


def _of_head(given: Subject, layer: Array, letter: str, head: Array, read: Array) -> Array:
    """The query, key or value of one head of a layer that reads `read` of the stream."""
    model, config = given.model, given.model.config
    if model.blocks.ln1 is not None:
        read = jax.tree.map(lambda x: x[layer], model.blocks.ln1)(read, config)
    W, b = (getattr(model.blocks.attn, f"{part}_{letter.upper()}") for part in "Wb")
    y = contract("...m,md->...d", read, W[layer, :, head], config)
    y = y if b is None else y + b[layer, head]
    return y if config.qkv_clip is None else jnp.clip(y, -config.qkv_clip, config.qkv_clip)


def _of_units(given: Subject, clean: _Clean, layer: Array, added: Array, own: Bool[Array, " unit"]) -> Array:
    """What some units of a layer's MLP write more where they read something more."""
    graph, config = given.graph, given.model.config
    block, _ = given.model.of_kind(layer, None)
    index, mid = units_of(graph.units, graph.n_units)[layer], cast(Array, clean.mid)[layer]
    change = values(block, mid + added, index, config) - values(block, mid, index, config)
    change = scaled(change, block, None if clean.scale is None else clean.scale[layer])
    return contract("...k,km->...m", jnp.where(own, change, 0), directions(block, index, config), config)


@eqx.filter_jit
def _of_nodes(given: Subject, chunk: int) -> Array:
    """The metric with all edges of one node ablated, for every node, at each span."""
    of = jnp.asarray(given.graph.senders)

    def ablate(place: Array) -> Array:
        kept = (of != place).astype(given.start.dtype)
        return given.masked(kept)

    n = len(given.graph.places)
    return jax.lax.map(ablate, jnp.arange(n, dtype=of.dtype), batch_size=min(chunk, n))
