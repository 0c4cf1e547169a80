"""A model whose circuit is known: what methods that look for circuits are judged by."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.graph.build import Graph
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder


class Truth(Record):
    """A model, its circuit, and prompts that show it.

    Scores such as `mj.attribution.exact(t.model, t.clean, t.corrupt, t.metric, graph=t.graph)` should be large where
    `t.varying` is true, and nowhere else.

    Attributes:
        circuit: Whether each edge carries something that the metric hangs on.
        constant: Whether what it carries is the same on both prompts, such as positions: then resampling it alone does
            nothing, though the circuit needs it.
        clean: Prompts on which the metric is high.
        corrupt: Prompts on which it is low.
        metric: The metric.
        model: The model.
        graph: Its graph (static).
    """

    circuit: Bool[Array, " edge"]
    constant: Bool[Array, " edge"]
    clean: Int[Array, "batch pos"]
    corrupt: Int[Array, "batch pos"]
    metric: Metric
    model: Decoder
    graph: Graph = eqx.field(static=True)

    @property
    def varying(self) -> Bool[Array, " edge"]:
        """The edges of the circuit that differ between the prompts: those that resampling can find."""
        return self.circuit & ~self.constant

    @property
    def nodes(self) -> Bool[Array, " node"]:
        """The nodes that such an edge leaves, in the order of `graph.nodes`."""
        found = jnp.zeros(len(self.graph.nodes), bool)
        return found.at[self.graph.table[:, 0]].max(self.varying)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of edges."""
        return {"edge": self.graph.edges}


def whole(name: str, value: object, least: int) -> int:
    """A whole number.

    Raises:
        ArgumentError: It is none, or less than `least`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ArgumentError(f"{name}={value!r}: give a whole number from {least}.")
    return value
