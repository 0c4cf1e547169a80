"""The masked forward: every reader gets each node's write as it is in this run, or as it is when ablated.

    x_v = sum_u [M[u, v] w_u + (1 - M[u, v]) a_u]

over the nodes u before the reader v. `w_u` is what u writes in this very run (so it changes with the edges cut before
it), `a_u` what it writes when ablated, M is `kept`. Exact edge patching evaluates it, EAP is its gradient at M = 1,
faithfulness evaluates it on many masks (`vmap` over `kept`), and learned masks optimise it.

Where a norm stands after attention, a head's write is its share of the norm's output, at the scale of the run. Where
positions are apart, M and the sum are those of the position's span.
Cost: a forward in which every head reads apart, and `node * reader` products of stream vectors. Memory: one stream per
node; gradients keep them for every layer.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.graph.build import Graph
from mechjax.graph.spans import spans_of
from mechjax.graph.tap import READS, tapped
from mechjax.graph.units import directions, scaled, units_of, values, values_apart
from mechjax.graph.writes import Writes, head_vectors
from mechjax.models.block import Block
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, Tokens, as_tokens, over_blocks
from mechjax.models.marks import marks_of
from mechjax.models.needs import needs_decoder
from mechjax.models.positions import Varying
from mechjax.transform.context import wanting


@needs_decoder("graph")
@on_any_mesh
def masked_forward(
    model: Decoder,
    tokens: Tokens,
    kept: Float[Array, " edge"],
    ablated: Writes,
    *,
    graph: Graph,
    positions: Mapping[str, Any] | None = None,
    mask: Bool[Array, "*batch pos"] | None = None,
) -> Float[Array, "*batch pos d_vocab"]:
    """Logits of a run in which edges are cut.

    Args:
        model: The decoder.
        tokens: Prompts.
        kept: 1 for each edge that carries what its node writes, 0 for each that carries the ablated write, anything
            between for a mixture; in the order of `graph.edges`.
        ablated: What nodes write when ablated, such as `mj.graph.writes(model, corrupt, graph=graph)`; shaped as the
            run.
        graph: The model's graph.
        positions: Where the graph's spans are, where these have names: for each, one position per example, several, or
            a mask (batch, pos).
        mask: True for real tokens.

    Raises:
        ArgumentError: The graph of another model, spans that it does not have, or ablated writes of another graph.
        ShapeError: A mask with another number of edges, or prompts of another length than the graph's positions.
    """
    ids, mask = as_tokens(tokens, mask, model.config)
    return _logits(model, ids, kept, ablated, graph, spans_of(graph, positions, ids.shape), mask)


@eqx.filter_jit
def _logits(
    model: Decoder, ids: Array, kept: Array, ablated: Writes, graph: Graph, spans: Array | None,
    mask: Array | None,
) -> Array:  # fmt: skip
    start = model.embed(ids, mask=mask)
    return model.unembed(masked_stream(model, start, kept, ablated, graph=graph, spans=spans, mask=mask))


@needs_decoder("graph")
@on_any_mesh
def masked_stream(
    model: Decoder,
    start: Float[Array, "*batch pos d_model"],
    kept: Float[Array, " edge"],
    ablated: Writes,
    *,
    graph: Graph,
    spans: Int[Array, "*batch pos"] | None = None,
    mask: Bool[Array, "*batch pos"] | None = None,
) -> Float[Array, "*batch pos d_model"]:
    """What the unembedding reads in a run in which edges are cut, from what enters the first block.

    Arguments and errors as in `masked_forward`, but for `spans`: the span that each position is in, -1 for none.
    """
    model = graph.view(model)
    n_units = 0 if ablated.units is None else ablated.units.shape[-1]
    if n_units != graph.n_units:
        raise ArgumentError(
            f"the graph has {graph.n_units} units of an MLP as nodes and `ablated` says what {n_units} of them write: "
            "record it with the graph, mj.graph.writes(model, corrupt, graph=graph)."
        )
    sequence = model.arrange(start.shape[-2], mask=mask)
    run = _Run(model, graph, ablated, (1 - graph.square(kept)).astype(start.dtype), spans)

    def step(carry: tuple[Array, Array], block: Block, here: Varying, layer: Array) -> tuple[Array, Array]:
        resid, moved = carry
        seen: dict[str, Array] = {}
        changes = run.changes(block, layer, moved, seen)
        mark = tapped(marks_of(layer, model.config), changes, seen)
        resid, _ = block(resid, sequence, here, layer, model.config, mark=mark)
        return run.after(block, layer, resid, moved, seen)

    n_rows = 1 + graph.n_layers * graph.n_writers
    moved = jnp.zeros((n_rows, *start.shape), start.dtype).at[0].set(ablated.input - start)
    with wanting(READS):
        resid, moved = over_blocks(model, step, (start, moved))
    return resid + run.read(moved, run.cut[:, -1:])[..., 0, :]


class _Run(eqx.Module):
    """What the steps of a masked run share.

    Attributes:
        model: The decoder as its graph sees it.
        graph: Its graph (static).
        ablated: What nodes write when ablated.
        cut: 1 less the mask. Shape (row, column, span).
        spans: The span of each position; None where all are one.
    """

    model: Decoder
    graph: Graph = eqx.field(static=True)
    ablated: Writes
    cut: Float[Array, "row column span"]
    spans: Int[Array, "*batch pos"] | None

    def read(
        self, moved: Float[Array, "row *batch pos d_model"], cut: Float[Array, "row reader span"]
    ) -> Float[Array, "*batch pos reader d_model"]:
        """What cut edges add to what some readers read: the rows of `moved`, each as far as it is cut."""
        config = self.model.config
        if self.spans is None:
            return contract("u...m,uh->...hm", moved, cut[..., 0], config)
        inside = jax.nn.one_hot(self.spans, cut.shape[-1], dtype=cut.dtype)  # zero where there is no span
        return contract("u...m,...uh->...hm", moved, contract("...s,uhs->...uh", inside, cut, config), config)

    def edges(self, layer: Array) -> dict[str, Array]:
        """The columns of one layer's readers, by site."""
        sizes = list(self.graph.reads.values())
        here = lax.dynamic_slice_in_dim(self.cut, layer * sum(sizes), sum(sizes), 1)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
        return dict(zip(self.graph.reads, jnp.split(here, ends, axis=1), strict=True))

    def changes(self, block: Block, layer: Array, moved: Array, seen: dict[str, Array]) -> dict[str, Any]:
        """What is done to what each reader of a layer reads, while its block runs."""
        edges = self.edges(layer)

        def read_apart(name: str) -> Any:
            return lambda x: x + self.read(moved, edges[name])

        def read_mlp(x: Array) -> Array:
            others = self.with_heads(block, layer, moved, seen) if self.graph.serial else moved
            if self.graph.units:
                seen["units"] = x[..., None, :] + self.read(others, edges["units"])
            return x + self.read(others, edges["mlp_in"])[..., 0, :]

        heads = {name: read_apart(name) for name in ("q_input", "k_input", "v_input")}
        return heads | {"mlp_in": read_mlp}

    def with_heads(self, block: Block, layer: Array, moved: Array, seen: dict[str, Array]) -> Array:
        """`moved`, with the rows of this layer's heads."""
        z = seen["z"]
        if block.ln1_post is not None:
            z = z / seen["ln1_post.scale"][..., None].astype(z.dtype)
        own = _row(self.ablated.heads, layer) - z
        heads = head_vectors(block.attn.W_O, block.ln1_post, own, self.model.config)
        return _put(moved, jnp.moveaxis(heads, -2, 0), 1 + layer * self.graph.n_writers)

    def after(
        self, block: Block, layer: Array, resid: Array, moved: Array, seen: dict[str, Array]
    ) -> tuple[Array, Array]:
        """The stream that leaves a layer, and `moved` with all its rows."""
        graph, moved = self.graph, self.with_heads(block, layer, moved, seen)
        if self.ablated.mlps is None:
            return resid, moved
        place = 1 + layer * graph.n_writers + graph.n_heads
        left = _row(self.ablated.mlps, layer) - seen["mlp_out"]
        if self.ablated.units is None:
            return resid, _put(moved, left[None], place)
        config = self.model.config
        index = _row(units_of(graph.units, graph.n_units), layer)
        within = lambda found: scaled(found, block, seen.get("ln2_post.scale"))
        towards = directions(block, index, config)
        alone = within(values_apart(block, seen["units"], index, config))
        along = within(
            values(block, seen["mlp_in"], index, config)
        )  # as what is left reads, which makes no units
        off = _row(self.ablated.units, layer)
        resid = resid + contract("...k,km->...m", alone - along, towards, config)
        left = left - contract("...k,km->...m", off - along, towards, config)
        own = jnp.moveaxis((off - alone)[..., None] * towards, -2, 0)
        return resid, _put(moved, jnp.concatenate((own, left[None])), place)


def _row(stacked: Array, layer: Array) -> Array:
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _put(rows: Array, new: Array, at: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(rows, new, at, 0)
