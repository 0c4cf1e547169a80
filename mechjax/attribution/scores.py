"""The record of an attribution."""

from collections.abc import Mapping, Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.graph.agreement import Agreement, agreement
from mechjax.graph.build import Graph
from mechjax.models.backward_rules import GRADIENT

Reduce = Literal["mean", "abs_of_mean", "mean_of_abs"]
"""How the examples' scores become one number."""


class Scores(Record):
    """What edges, or nodes, do for a metric: the metric as it is less the metric where they are ablated.

    Positive where they help the metric. In the order of `graph.edges`, or of `graph.places`: nodes, at each span where
    positions are apart. NaN where an exact score was not asked for.

    Attributes:
        scores: One number per edge, or node.
        clean: Metric of the clean run, per example.
        graph: The graph (static).
        over: ("edge",) or ("node",) (static).
        method: What made them (static).
        ablation: What stands in for what is ablated (static).
        reduce: How examples became one number (static).
    """

    scores: Float[Array, "*over"]
    clean: Float[Array, " batch"]
    graph: Graph = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    method: str = eqx.field(static=True)
    ablation: str = eqx.field(static=True)
    reduce: str = eqx.field(static=True)

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """Names of edges and nodes."""
        return {"edge": self.graph.edges, "node": self.graph.places}

    @property
    def asked(self) -> Bool[np.ndarray, " item"]:
        """Which scores were asked for: all, but of exact ones of some edges."""
        scores = whole(self.scores)
        return ~np.isnan(scores) if self.method == "exact" else np.ones(scores.shape, bool)

    def compare(self, exact: "Scores", n: int | None = None) -> Agreement:
        """How well these scores agree with those of `exact`: Pearson, Spearman, AUROC, overlap of the `n` largest.

        Where `exact` has the scores of some edges only, these are compared.

        Raises:
            ArgumentError: Scores of another graph, of other things, or under another ablation.
        """
        for what in ("graph", "over", "ablation", "reduce"):
            mine, other = getattr(self, what), getattr(exact, what)
            if mine != other:
                raise ArgumentError(
                    f"these scores have {what}={mine!r} and those to compare with have {what}={other!r}: compare what "
                    "was made of the same graph, in the same way."
                )
        return agreement(whole(self.scores)[exact.asked], whole(exact.scores)[exact.asked], n)

    def nodes(self) -> "Scores":
        """What each node does, from its edges: for gradients the sum over them is the node's own score.

        Raises:
            ArgumentError: Exact scores, whose sum over edges is not the node's, or sizes, which do not add up.
        """
        if self.over != ("edge",) or self.method == "exact" or self.reduce != "mean":
            raise ArgumentError(
                f"scores of nodes are sums over edges where those are gradients, signed; these are over={self.over}, "
                f"method={self.method!r}, reduce={self.reduce!r}. Exact scores of nodes: exact(..., over='node')."
            )
        sums = jnp.zeros(len(self.graph.places), self.scores.dtype).at[self.graph.senders].add(self.scores)
        return Scores(sums, self.clean, self.graph, ("node",), self.method, self.ablation, self.reduce)


def reduced(found: Float[Array, "example item"], reduce: str) -> Float[Array, " item"]:
    """One number per item: the mean over examples, its size, or the mean of the examples' sizes."""
    if reduce == "mean_of_abs":
        return jnp.abs(found).mean(0)
    return found.mean(0) if reduce == "mean" else jnp.abs(found.mean(0))


def named(method: str, **settings: object) -> str:
    """A method with those settings that are not the default, as its call reads."""
    told = [f"{name}={value!r}" for name, value in settings.items() if value != GRADIENT]
    return f"{method}({', '.join(told)})" if told else method
