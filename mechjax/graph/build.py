"""The graph of a decoder: static tables of the nodes that write, the readers, and the edges between them.

Nodes write to the residual stream: `input` (token and position embeddings), `a{layer}.h{head}` and `m{layer}`, in
forward order. Readers take from it: `a{layer}.h{head}<q>`, keys and values (`a{layer}.kv{head}<k>` where heads share
them), `m{layer}` and `logits`. A reader sees every node before it, so its edges are those of the first so many nodes.
Biases that are added whatever a head does (`b_O`) belong to no node, and no ablation touches them.

The conventions, but for shared keys and values, are those of Hanna et al. 2024, arXiv:2403.17806, and of the MIB
benchmark (Mueller et al. 2025, arXiv:2504.13151).
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError, did_you_mean
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
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
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    mlp: bool
    serial: bool
    grouped: bool

    @property
    def n_writers(self) -> int:
        """Nodes of one layer."""
        return self.n_heads + self.mlp

    @property
    def reads(self) -> dict[str, int]:
        """Site -> readers of one layer, in their order."""
        heads = {"q_input": self.n_heads, "k_input": self.n_kv_heads, "v_input": self.n_kv_heads}
        return heads | ({"mlp_in": 1} if self.mlp else {})

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that write."""
        own = [f"a{{0}}.h{h}" for h in range(self.n_heads)] + ["m{0}"] * self.mlp
        return ("input", *(name.format(layer) for layer in range(self.n_layers) for name in own))

    @cached_property
    def readers(self) -> tuple[str, ...]:
        """Names of the readers."""
        group = "h" if self.n_kv_heads == self.n_heads else "kv"
        own = [f"a{{0}}.h{h}<q>" for h in range(self.n_heads)]
        own += [f"a{{0}}.{group}{h}<{letter}>" for letter in "kv" for h in range(self.n_kv_heads)]
        own += ["m{0}"] * self.mlp
        return (*(name.format(layer) for layer in range(self.n_layers) for name in own), "logits")

    @cached_property
    def before(self) -> tuple[int, ...]:
        """For each reader the number of nodes before it, which are those that it reads."""
        of_mlp = self.n_heads if self.serial else 0
        after = [of_mlp if site == "mlp_in" else 0 for site, n in self.reads.items() for _ in range(n)]
        starts = [1 + layer * self.n_writers for layer in range(self.n_layers)]
        return (*(start + more for start in starts for more in after), len(self.nodes))

    @cached_property
    def table(self) -> np.ndarray:
        """Node and reader of every edge, reader by reader. Shape (edge, 2)."""
        return np.concatenate(
            [np.stack([np.arange(n), np.full(n, reader)], -1) for reader, n in enumerate(self.before)]
        ).astype(np.int32)

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """Names of the edges, such as `a0.h1->a1.h2<q>`, in the order of every array of edges."""
        return tuple(f"{self.nodes[u]}->{self.readers[v]}" for u, v in self.table)

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

    def flat(self, square: Float[Array, "node reader"]) -> Float[Array, " edge"]:
        """The edges of a table of all nodes by all readers."""
        return square[self.table[:, 0], self.table[:, 1]]

    def square(self, edges: Float[Array, " edge"]) -> Float[Array, "node reader"]:
        """Edges as a table of all nodes by all readers, one where there is no edge.

        Raises:
            ShapeError: Not one number per edge.
        """
        if edges.shape != (len(self.table),):
            raise ShapeError(
                f"a mask of shape {edges.shape} for {len(self.table)} edges: give one number per edge, in the order of "
                "`graph.edges`."
            )
        whole = jnp.ones((len(self.nodes), len(self.readers)), edges.dtype)
        return whole.at[self.table[:, 0], self.table[:, 1]].set(edges)

    def view(self, model: Decoder) -> Decoder:
        """The model as this graph sees it: with keys and values of its own for every head where it is not `grouped`.

        Raises:
            ArgumentError: The graph is that of another model.
        """
        own = _of(model.config, grouped=self.grouped)
        if own != self:
            differ = [
                f.name for f in dataclasses.fields(self) if getattr(own, f.name) != getattr(self, f.name)
            ]
            told = ", ".join(
                f"{name} {getattr(self, name)} (the model: {getattr(own, name)})" for name in differ
            )
            raise ArgumentError(
                f"the graph is of another model: it has {told}. Make it with mj.graph.build(model)."
            )
        return model if self.grouped else ungroup_kv(model)

    def __repr__(self) -> str:
        """One line."""
        shape = f"{self.n_layers} layers of {self.n_heads} heads{' and an MLP' * self.mlp}"
        return (
            f"Graph of {shape}: {len(self.nodes)} nodes, {len(self.readers)} readers, {len(self.table)} edges"
        )


def build(model: Decoder, *, grouped: bool = True) -> Graph:
    """The graph of a decoder's heads and MLPs, queries, keys and values read apart, positions summed.

    Args:
        model: The decoder.
        grouped: Whether keys and values that heads share are one reader, as they are in the model. False gives every
            query head readers of its own, the convention of MIB; masked runs then need the model's keys repeated.

    Raises:
        UnsupportedModelError: A model whose heads' writes do not add up to what attention writes.
    """
    config = model.config
    if config.norms in ("post", "both") and config.out_bias:
        raise UnsupportedModelError(
            "a norm stands after attention, and a bias before that norm: part of what attention writes is then no "
            "head's and differs from run to run. The graph of such a model has no node for it."
        )
    return _of(config, grouped=grouped)


def _of(config: Config, *, grouped: bool) -> Graph:
    shared = grouped or config.n_kv_heads == config.n_heads
    n_kv = config.n_kv_heads if grouped else config.n_heads
    return Graph(
        config.n_layers, config.n_heads, n_kv, config.mlp != "none", config.residual == "serial", shared
    )
