"""The record of a patching sweep."""

import warnings
from collections.abc import Mapping, Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.display import largest
from mechjax.base.records import Record
from mechjax.base.whole import whole

SAME = 1e-6  # runs whose metrics differ by less explain nothing: DESIGN section 5


class PatchScores(Record):
    """What a metric becomes when one activation at a time comes from the other run.

    Attributes:
        scores: Metric of the patched run, mean over examples. Axes as in `over`.
        per_example: The same per example.
        clean: Metric of the clean run, per example.
        corrupt: Metric of the corrupt run, per example.
        site: The site that was patched (static).
        over: The axes that were swept (static).
        mode: "denoise" (clean activations put into the corrupt run) or "noise" (the reverse) (static).
        labels: Axis -> the name of each index, where it has names (static).
    """

    scores: Float[Array, "*over"]
    per_example: Float[Array, "*over batch"]
    clean: Float[Array, " batch"]
    corrupt: Float[Array, " batch"]
    site: str = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    labels: tuple[tuple[str, tuple[str, ...]], ...] = eqx.field(static=True, default=())

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """The names of the indices of some axes."""
        return dict(self.labels)

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` places whose patch moves the metric furthest, as (label, effect)."""
        return largest(self.effect, self.over, n, self.axis_labels())

    @property
    def effect(self) -> Float[Array, "*over"]:
        """How far the patch takes the metric from the run that it changes to the run that it comes from: 0 to 1.

        The same as `recovered` under "denoise", and `1 - recovered` under "noise". NaN as `recovered`.
        """
        return self.recovered if self.mode == "denoise" else 1 - self.recovered

    @property
    def recovered(self) -> Float[Array, "*over"]:
        """How much of the difference between the runs the patch carries: 0 as in the corrupt run, 1 as in the clean.

        NaN, with a warning, where the two runs differ by less than 1e-6.
        """
        clean, corrupt = self.clean.mean(), self.corrupt.mean()
        gap = clean - corrupt
        if bool(np.abs(whole(gap)) < SAME):
            warnings.warn(
                f"`recovered` is undefined: the metric is {float(clean):.6g} in the clean and {float(corrupt):.6g} in "
                "the corrupt run, so there is no difference to recover. Read `scores`, or choose prompts that differ.",
                stacklevel=2,
            )
            return jnp.full_like(self.scores, jnp.nan)
        return (self.scores - corrupt) / gap
