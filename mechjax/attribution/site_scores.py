"""The record of an attribution of activations, place by place of a site."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.attribution.scores import reduced
from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.graph.agreement import Agreement, agreement

SAME_RUN = 1e-3  # clean metrics that differ by more, beside 1, are of other prompts or another metric


class SiteScores(Record):
    """What activations do for a metric: the metric as it is less the metric where they are ablated.

    Positive where they help the metric.

    Attributes:
        scores: One number per place. Axes as in `over`.
        per_example: The same per example, before `reduce`.
        clean: Metric of the clean run, per example.
        site: The site that was attributed (static).
        over: The axes that its places have; the others are ablated whole (static).
        labels: Axis -> the name of each index, where it has names (static).
        method: What made them (static).
        ablation: What stands in for what is ablated (static).
        reduce: How examples became one number (static).
    """

    scores: Float[Array, "*over"]
    per_example: Float[Array, "*over batch"]
    clean: Float[Array, " batch"]
    site: str = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    labels: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True)
    method: str = eqx.field(static=True)
    ablation: str = eqx.field(static=True)
    reduce: str = eqx.field(static=True)

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """The names of the indices of some axes."""
        return dict(self.labels)

    def compare(self, exact: Any, n: int | None = None) -> Agreement:
        """How well these scores agree with exact ones: Pearson, Spearman, AUROC, overlap of the `n` largest.

        Args:
            exact: `activation_patch(..., mode="noise")` of the same prompts, site and axes, whose effect is the clean
                metric less the patched one; or other scores of this class.
            n: How many of the exact scores count as large; a tenth of them by default.

        Raises:
            ArgumentError: A record of something else.
        """
        return agreement(self.scores.ravel(), self.truth(exact).ravel(), n)

    def truth(self, exact: Any) -> Float[Array, "*over"]:
        """The effects that an exact record holds, examples reduced as here.

        Raises:
            ArgumentError: A record of something else.
        """
        missing = [w for w in ("per_example", "clean", "site", "over", "labels") if not hasattr(exact, w)]
        if missing:
            raise ArgumentError(
                f"cannot compare with a {type(exact).__name__}, which has no `{missing[0]}`: give the record of "
                "activation_patch(..., mode='noise') at the same site."
            )
        patched = hasattr(exact, "mode")
        if patched and exact.mode != "noise":
            raise ArgumentError(
                f"the record to compare with has mode={exact.mode!r}: scores say what ablating the clean run does, "
                "which activation_patch(..., mode='noise') measures."
            )
        theirs = "resample" if patched else exact.ablation
        for what, mine, other in (
            ("site", self.site, exact.site),
            ("over", self.over, exact.over),
            ("labels", self.labels, exact.labels),
            ("ablation", self.ablation, theirs),
        ):
            if mine != other:
                raise ArgumentError(
                    f"these scores have {what}={mine!r} and those to compare with have {what}={other!r}: compare what "
                    "was made of the same places, in the same way."
                )
        if self.clean.shape != exact.clean.shape or not np.allclose(
            self.clean, exact.clean, SAME_RUN, SAME_RUN
        ):
            raise ArgumentError(
                "the clean runs of the two records give different metrics: compare what was made of the same prompts "
                "and metric."
            )
        return reduce_examples(exact.clean - exact.per_example if patched else exact.per_example, self.reduce)


def reduce_examples(per_example: Float[Array, "*over batch"], reduce: str) -> Float[Array, "*over"]:
    """One number per place: the mean over examples, its size, or the mean of the examples' sizes."""
    rows = per_example.reshape(-1, per_example.shape[-1]).T
    return reduced(rows, reduce).reshape(per_example.shape[:-1])


def site_scores(
    per_example: Float[Array, "*over batch"], clean: Float[Array, " batch"], **static: Any
) -> SiteScores:
    """The record, its examples reduced."""
    return SiteScores(
        reduce_examples(per_example, static["reduce"]), jnp.asarray(per_example), clean, **static
    )
