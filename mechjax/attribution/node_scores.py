"""The record of an attribution of all nodes: heads' queries, keys, values and outputs, and neurons, by position."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.attribution.site_scores import SiteScores, reduce_examples
from mechjax.base.axes import label
from mechjax.base.display import LEADING, as_html, largest
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.graph.agreement import Agreement, agreement

Axes = tuple[tuple[str, tuple[str, ...]], ...]


class NodeScores(Record):
    """What nodes do for a metric. `scores["q"]` has a number per layer, position and head.

    Attributes:
        scores: Site -> one number per node. Axes as in `axes`.
        per_example: The same per example, before `reduce`.
        clean: Metric of the clean run, per example.
        named: The columns of named positions, per example; None where every position is a node's.
        axes: Each site with the axes of its nodes (static).
        labels: Axis -> the name of each index, where it has names (static).
        method: What made them (static).
        ablation: What stands in for what is ablated (static).
        reduce: How examples became one number (static).
    """

    scores: dict[str, Float[Array, "..."]]
    per_example: dict[str, Float[Array, "..."]]
    clean: Float[Array, " batch"]
    named: Int[Array, "role batch"] | None
    axes: Axes = eqx.field(static=True)
    labels: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True)
    method: str = eqx.field(static=True)
    ablation: str = eqx.field(static=True)
    reduce: str = eqx.field(static=True)

    def axis_names(self, field: str, key: str | None = None) -> tuple[str, ...] | None:
        """The nodes' axes, and the examples last."""
        if key is None:
            return {"clean": ("batch",), "named": ("role", "batch")}.get(field)
        own = dict(self.axes)[key]
        return own if field == "scores" else (*own, "batch")

    def __getitem__(self, site: str) -> SiteScores:
        """The scores of one site's nodes."""
        if site not in self.scores:
            raise SiteError(f"no scores of `{site}` here; this record holds {', '.join(dict(self.axes))}.")
        return SiteScores(
            self.scores[site], self.per_example[site], self.clean, site, dict(self.axes)[site], self.labels,
            self.method, self.ablation, self.reduce,
        )  # fmt: skip

    def flat(self) -> Float[Array, " node"]:
        """The scores of all nodes, site after site."""
        return jnp.concatenate([self.scores[site].ravel() for site, _ in self.axes])

    def place(self, node: int) -> tuple[str, tuple[int, ...]]:
        """The site of a node of `flat`, and its index there."""
        for site, _ in self.axes:
            shape = self.scores[site].shape
            if node < int(np.prod(shape)):
                return site, tuple(int(i) for i in np.unravel_index(node, shape))
            node -= int(np.prod(shape))
        raise ArgumentError("there are fewer nodes.")

    def name(self, node: int) -> str:
        """What a node of `flat` is called, such as `q L0.H1 @ 4`."""
        site, place = self.place(node)
        return f"{site} {label(dict(self.axes)[site], place, dict(self.labels))}"

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` nodes whose scores are largest in size, as (name, score)."""
        found = largest(self.flat(), ("node",), n, {})
        order = np.argsort(-np.abs(whole(self.flat())), kind="stable")[: len(found)]
        return [(self.name(int(i)), score) for i, (_, score) in zip(order, found, strict=True)]

    def _repr_html_(self) -> str:
        return as_html(self, dict(self.labels), self.top(LEADING))

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per node: its site, its place, its score."""
        return [{"site": site} | row for site, _ in self.axes for row in self[site].rows()]

    def compare(self, exact: Mapping[str, Any] | Record, n: int | None = None) -> Agreement:
        """How well the scores of all these sites' nodes together agree with exact ones.

        Args:
            exact: Site -> `activation_patch(..., mode="noise")` over the same axes; `NodeScores` too.
            n: How many of the exact scores count as large; a tenth of them by default.

        Raises:
            ArgumentError: No site, or a record of something else.
            SiteError: A site that has no scores here.
        """
        if isinstance(exact, NodeScores):
            exact = {site: exact[site] for site, _ in exact.axes}
        if not isinstance(exact, Mapping) or not exact:
            raise ArgumentError(
                "no site to compare: give exact scores by their site, such as {'z': activation_patch(...)}."
            )
        sites = list(exact)
        mine = [self[site].scores.ravel() for site in sites]
        truth = [self[site].truth(exact[site]).ravel() for site in sites]
        return agreement(jnp.concatenate(mine), jnp.concatenate(truth), n)


def node_scores(
    per_example: dict[str, Array], clean: Array, named: Array | None, reduce: str, **static: Any
) -> NodeScores:
    """The record, its examples reduced."""
    scores = {site: reduce_examples(x, reduce) for site, x in per_example.items()}
    return NodeScores(scores, per_example, clean, named, reduce=reduce, **static)
