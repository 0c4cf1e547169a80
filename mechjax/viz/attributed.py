"""What every view of scores says of them: how they were made, and their numbers."""

import math

from mechjax.attribution import Scores
from mechjax.base.errors import ArgumentError
from mechjax.graph import Graph


def figure(value: float) -> str:
    """Three digits with a sign: scores may be small, and their sign is what they say first."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def decimals(full: float) -> int:
    """How many decimals numbers up to `full` need: the largest then has two digits, or three from ten on."""
    return max(int(full < 100), 1 - math.floor(math.log10(full))) if full else 0


def made(scores: Scores) -> str:
    """How scores were made, in a sentence or two."""
    size = {"mean": "", "abs_of_mean": " Sizes only.", "mean_of_abs": " Sizes only."}[scores.reduce]
    return (
        f"Method {scores.method}, ablation {scores.ablation}; the metric is {figure(float(scores.clean.mean()))} in "
        f"the clean run.{size}"
    )


def place_of(graph: Graph) -> str:
    """What columns of scores apart are: positions by their number, or spans by their names."""
    return "span" if graph.named else "position"


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
