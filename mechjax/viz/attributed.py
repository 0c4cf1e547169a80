"""What every view of scores says of them: how they were made, and their numbers."""

import math

from mechjax.attribution import Scores
from mechjax.base.errors import ArgumentError


def figure(value: float) -> str:
    """Three digits with a sign: scores may be small, and their sign is what they say first."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def decimals(full: float) -> int:
    """How many decimals numbers up to `full` need, so that the largest has two digits at least."""
    return max(0, 1 - math.floor(math.log10(full))) if full else 0


def made(scores: Scores) -> str:
    """How scores were made, in a sentence or two."""
    size = {"mean": "", "abs_of_mean": " Sizes only.", "mean_of_abs": " Sizes only."}[scores.reduce]
    return (
        f"Method {scores.method}, ablation {scores.ablation}; the metric is {figure(float(scores.clean.mean()))} in "
        f"the clean run.{size}"
    )


def expect(scores: Scores, over: str, other: str) -> None:
    """Whether scores are of what a view shows.

    Raises:
        ArgumentError: They are not; the view `other` shows them.
    """
    if scores.over != (over,):
        raise ArgumentError(
            f"these are scores over {', '.join(scores.over)}, and this view shows scores over {over}: use "
            f"mj.viz.{other}."
        )
