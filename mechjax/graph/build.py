"""The graph of a decoder: static tables of the nodes that write, the readers, and the edges between them.

Nodes write to the residual stream: `input` (token and position embeddings), `a{layer}.h{head}` and `m{layer}`, in
forward order. Readers take from it: `a{layer}.h{head}<q>`, keys and values (`a{layer}.kv{head}<k>` where heads share
them), `m{layer}` and `logits`. A reader sees every node before it, so its edges are those of the first so many nodes.
Biases that are added whatever a head does (`b_O`) belong to no node, and no ablation touches them.

Two things may be taken apart further. Of MLPs some `units` may be nodes and readers of their own: neurons
(`m{layer}.n{neuron}`), or latents of a dictionary (`m{layer}.f{feature}`, see `mj.graph.with_dictionary`); then
`m{layer}` is what is left. And an edge may be one edge at each position, or at each of some spans that have names: an
edge of the stream starts and ends at the same position.

The conventions, but for shared keys and values, are those of Hanna et al. 2024, arXiv:2403.17806, and of the MIB
benchmark (Mueller et al. 2025, arXiv:2504.13151). Edges at positions are those of Haklay et al. 2025, arXiv:2502.04577,
but for those by which they cut attention between positions. Latents, and what is left, are nodes in Marks et al. 2024,
arXiv:2403.19647.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError, did_you_mean
from mechjax.graph.units import Spliced, check_units
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.rewrite.ungroup_kv import ungroup_kv


@dataclass(frozen=True)
class Graph:
    """Which nodes and edges there are; static, hashable, a few numbers from which the tables follow.

    Attributes:
        n_layers: Number of layers.
        n_heads: Query heads of a layer.
        n_kv_heads: Readers of keys, and of values, of a layer.
        mlp: Whether layers have an MLP (or experts).
        serial: Whether the MLP reads what the heads of its own layer write.
        grouped: Whether keys and values that heads share are one reader.
        units: For each layer the units of its MLP that are nodes of their own; empty where there are none.
        unit: What units are: neurons, "n", or latents of a dictionary, "f" (features).
        spans: Names of the positions, or spans of positions, at which edges are apart; empty where all are summed.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: bool
    serial: bool
    grouped: bool
    units: tuple[tuple[int, ...], ...] = ()
    unit: Literal["n", "f"] = "n"
    spans: tuple[str, ...] = ()

    @property
    def n_units(self) -> int:
        """Units of the layer that has most; tables of layers have as many rows and columns for each."""
        return max(map(len, self.units), default=0)

    @property
    def n_writers(self) -> int:
        """Rows of one layer."""
        return self.n_heads + self.n_units + self.mlp

    @property
    def reads(self) -> dict[str, int]:
        """Site (or "units") -> readers of one layer, in their order."""
        heads = {"q_input": self.n_heads, "k_input": self.n_kv_heads, "v_input": self.n_kv_heads}
        units = {"units": self.n_units} if self.n_units else {}
        return heads | units | ({"mlp_in": 1} if self.mlp else {})

    @cached_property
    def own_units(self) -> tuple[tuple[str, ...], ...]:
        """Names of the units of each layer."""
        units = self.units or ((),) * self.n_layers
        return tuple(tuple(f"m{layer}.{self.unit}{i}" for i in own) for layer, own in enumerate(units))

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that write."""
        found = ["input"]
        for layer, units in enumerate(self.own_units):
            found += [f"a{layer}.h{h}" for h in range(self.n_heads)]
            found += [*units, *[f"m{layer}"] * self.mlp]
        return tuple(found)

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers."""
        group, found = "h" if self.n_kv_heads == self.n_heads else "kv", []
        for layer, units in enumerate(self.own_units):
            found += [f"a{layer}.h{h}<q>" for h in range(self.n_heads)]
            found += [f"a{layer}.{group}{h}<{letter}>" for letter in "kv" for h in range(self.n_kv_heads)]
            found += [*units, *[f"m{layer}"] * self.mlp]
        return (*found, "logits")

    @cached_property
    def rows(self) -> np.ndarray:
        """The row of each node in tables in which every layer has as many. Shape (node,)."""
        return np.concatenate([[0], 1 + self._places(self.n_heads, self.n_writers)])

    @cached_property
    def columns(self) -> np.ndarray:
        """The column of each reader in such tables. Shape (reader,)."""
        of_heads, own = self.n_heads + 2 * self.n_kv_heads, sum(self.reads.values())
        return np.append(self._places(of_heads, own), self.n_layers * own)

    def _places(self, of_heads: int, own: int) -> np.ndarray:
        """Where each layer's heads, units and MLP stand, of `own` places each."""
        layers = [[*range(of_heads + len(units)), *[own - 1] * self.mlp] for units in self.own_units]
        return np.concatenate([layer * own + np.array(places, int) for layer, places in enumerate(layers)])

    @cached_property
    def before(self) -> tuple[int, ...]:
        """For each reader the number of nodes before it, which are those that it reads."""
        found, start = [], 1
        for units, end in zip(self.own_units, self.ends, strict=True):
            found += [start] * (self.n_heads + 2 * self.n_kv_heads)
            found += [start + self.n_heads * self.serial] * (len(units) + self.mlp)
            start = end
        return (*found, start)

    @property
    def ends(self) -> tuple[int, ...]:
        """For each layer the number of nodes that there are by its end."""
        sizes = [self.n_heads + len(units) + self.mlp for units in self.own_units]
        return tuple(itertools.accumulate(sizes, initial=1))[1:]

    @cached_property
    def table(self) -> np.ndarray:
        """Node, reader and span of every edge, reader by reader. Shape (edge, 3)."""
        spans = max(len(self.spans), 1)
        pairs = np.concatenate(
            [np.stack([np.arange(n), np.full(n, reader)], -1) for reader, n in enumerate(self.before)]
        )
        span = np.tile(np.arange(spans), len(pairs))
        return np.column_stack([np.repeat(pairs, spans, 0), span]).astype(np.int32)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, such as `a0.h1->a1.h2<q>`, in the order of every array of edges."""
        return tuple(f"{self.nodes[u]}->{self.readers[v]}{self._at(s)}" for u, v, s in self.table.tolist())

    @cached_property
    def places(self) -> tuple[str, ...]:
        """Names of the nodes, at each span where there are any: the order of every array of nodes' scores."""
        spans = range(max(len(self.spans), 1))
        return tuple(f"{node}{self._at(s)}" for node, s in itertools.product(self.nodes, spans))

    @property
    def senders(self) -> np.ndarray:
        """The place, of `places`, that each edge leaves. Shape (edge,)."""
        return self.table[:, 0] * max(len(self.spans), 1) + self.table[:, 2]

    def _at(self, span: int) -> str:
        return f" @ {self.spans[span]}" if self.spans else ""

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.edges)}

    def __contains__(self, edge: object) -> bool:
        return edge in self._numbers

    def number(self, edge: str) -> int:
        """The place of an edge in arrays of edges.

        Raises:
            ArgumentError: No edge has this name.
        """
        if edge not in self:
            raise ArgumentError(
                f"the graph has no edge `{edge}`; its {len(self.edges)} edges are named like `{self.edges[-1]}`."
                f"{did_you_mean(edge, self.edges[:5000])}"
            )
        return self._numbers[edge]

    def flat(self, table: Float[Array, "node column span"]) -> Float[Array, " edge"]:
        """The edges of a table of all nodes by the columns of readers."""
        node, reader, span = self.table.T
        return table[node, self.columns[reader], span]

    def square(self, edges: Float[Array, " edge"]) -> Float[Array, "row column span"]:
        """Edges as a table of all rows by all columns, one where there is no edge.

        Raises:
            ShapeError: Not one number per edge.
        """
        if edges.shape != (len(self.table),):
            raise ShapeError(
                f"a mask of shape {edges.shape} for {len(self.table)} edges: give one number per edge, in the order of "
                "`graph.edges`."
            )
        node, reader, span = self.table.T
        n_columns = self.n_layers * sum(self.reads.values()) + 1
        whole = jnp.ones((1 + self.n_layers * self.n_writers, n_columns, int(span.max()) + 1), edges.dtype)
        return whole.at[self.rows[node], self.columns[reader], span].set(edges)

    def view(self, model: Decoder) -> Decoder:
        """The model as this graph sees it: with keys and values of its own for every head where it is not `grouped`.

        Raises:
            ArgumentError: The graph is that of another model.
        """
        own = _of(model.config, grouped=self.grouped)
        differ = [
            f.name for f in dataclasses.fields(self)
            if f.name not in ("units", "unit", "spans") and getattr(own, f.name) != getattr(self, f.name)
        ]  # fmt: skip
        if differ:
            told = ", ".join(
                f"{name} {getattr(self, name)} (the model: {getattr(own, name)})" for name in differ
            )
            raise ArgumentError(
                f"the graph is of another model: it has {told}. Make it with mj.graph.build(model)."
            )
        if self.units:
            check_units(model, self.units, self.unit)
        return model if self.grouped else ungroup_kv(model)

    @property
    def seen(self) -> "Graph":
        """The graph of the model that `view` gives."""
        return dataclasses.replace(self, grouped=True)

    def whole(self, method: str) -> "Graph":
        """This graph, if it takes neither MLPs nor positions apart.

        Raises:
            ArgumentError: It does, and `method` does not.
        """
        if self.units or self.spans:
            told = " and ".join(["units of MLPs"] * bool(self.units) + ["positions"] * bool(self.spans))
            raise ArgumentError(
                f"{method} takes heads and whole MLPs at all positions, and this graph has {told} apart: give "
                "mj.graph.build(model). exact, eap and eap_ig take such graphs."
            )
        return self

    def __repr__(self) -> str:
        """One line."""
        shape = f"{self.n_layers} layers of {self.n_heads} heads{' and an MLP' * self.mlp}"
        if self.units:
            kind = {"n": "neurons", "f": "latents"}[self.unit]
            shape += f", {sum(map(len, self.units))} {kind} apart"
        if self.spans:
            shape += f", at {len(self.spans)} {'spans' if self.named else 'positions'}"
        return (
            f"Graph of {shape}: {len(self.nodes)} nodes, {len(self.readers)} readers, {len(self.table)} edges"
        )

    @property
    def named(self) -> bool:
        """Whether its spans have names, in place of every position by its number."""
        return self.spans != tuple(map(str, range(len(self.spans))))


@needs_decoder("graph")
def build(
    model: Decoder,
    *,
    grouped: bool = True,
    positions: int | Sequence[str] | None = None,
    units: Mapping[int, Sequence[int]] | Literal["all"] | None = None,
) -> Graph:
    """The graph of a decoder's heads and MLPs, queries, keys and values read apart.

    Args:
        model: The decoder.
        grouped: Whether keys and values that heads share are one reader, as they are in the model. False gives every
            query head readers of its own, the convention of MIB; masked runs then need the model's keys repeated.
        positions: None sums positions. A number of tokens makes every edge one at each position of prompts of that
            length. Names make it one at each span of that name, and methods are told where these are; at other
            positions no edge is ever cut.
        units: For some layers, the units of their MLP that are nodes by themselves: neurons, or latents where the
            model has a dictionary (`mj.graph.with_dictionary`); "all" takes every one. The edges of n units among
            themselves are n * n: choose those that matter at real sizes.

    Raises:
        UnsupportedModelError: A model whose heads' writes do not add up to what attention writes, or whose MLPs cannot
            be taken apart.
        ArgumentError: Positions or units that there are not.
    """
    config = model.config
    if config.norms in ("post", "both") and config.out_bias:
        raise UnsupportedModelError(
            "a norm stands after attention, and a bias before that norm: part of what attention writes is then no "
            "head's and differs from run to run. The graph of such a model has no node for it."
        )
    graph = _of(config, grouped=grouped)
    if positions is not None:
        graph = dataclasses.replace(graph, spans=_spans(positions))
    if units is not None:
        latents = isinstance(model.blocks.mlp, Spliced)
        if latents and not graph.grouped:
            raise UnsupportedModelError(
                "grouped=False makes a model with keys repeated, and a dictionary is not carried over to it: build the "
                "graph with grouped=True, or without units."
            )
        unit = "f" if latents else "n"
        graph = dataclasses.replace(graph, units=check_units(model, units, unit), unit=unit)
    return graph


def _spans(positions: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(positions, int):
        if positions < 1 or isinstance(positions, bool):
            raise ArgumentError(
                f"positions={positions}: give a number of tokens, at least one, or names of spans."
            )
        return tuple(map(str, range(positions)))
    names = (positions,) if isinstance(positions, str) else tuple(positions)
    wrong = [name for name in names if not isinstance(name, str) or not name or "->" in name]
    if not names or wrong or len(set(names)) < len(names):
        raise ArgumentError(
            f"positions={positions!r}: give the number of tokens, or names of spans, at least one and each of them "
            "once, such as ('subject', 'END')."
        )
    return names


def _of(config: Config, *, grouped: bool) -> Graph:
    shared = grouped or config.n_kv_heads == config.n_heads
    n_kv = config.n_kv_heads if grouped else config.n_heads
    return Graph(
        config.n_layers, config.n_heads, n_kv, config.mlp != "none", config.residual == "serial", shared
    )
