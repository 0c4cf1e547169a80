"""A patching sweep as a page and as text: which places bring the answer back."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from rich.console import Group, RenderableType
from rich.text import Text

from mechjax.patching import PatchScores
from mechjax.viz.heatmap import heatmap, legend, number
from mechjax.viz.html import escape, tag
from mechjax.viz.page import Page, section
from mechjax.viz.text import heat_table

_WIDEST = 16  # columns that still fit a terminal
_NOTHING = 0.005  # rounds to 0.00

Names = Mapping[str, Sequence[str]]


def scores_page(scores: PatchScores, *, title: str, names: Names | None = None) -> Page:
    """A page with the heat map of a sweep over one or two axes; of more, its first two, the others averaged.

    Args:
        scores: The sweep.
        title: The page's heading.
        names: For some axes, the name of each index (`{"pos": tokenizer.str_tokens(prompt)}`).
    """
    values, axes = _two_axes(scores)
    rows, columns = (_named(axis, size, scores, names) for axis, size in zip(axes, values.shape, strict=True))
    what = f"clean {float(scores.clean.mean()):.2f}, corrupt {float(scores.corrupt.mean()):.2f}"
    base, other = ("corrupt", "clean") if scores.mode == "denoise" else ("clean", "corrupt")
    about = f"Each cell is a run on the {base} prompt with one piece of the {other} run put in."
    shown = heatmap(
        values, rows, columns, caption=f"How much of the difference it carries (metric: {what})", limit=1.0,
        tip=lambda i, j: f"{rows[i]}, {columns[j]}: {number(float(values[i, j]))}",
    )  # fmt: skip
    words = legend("−1 the other way", f"0 as the {base} run", f"1 as the {other} run")
    return Page(
        title, escape([tag("h1", title), section(f"{scores.site}, one place at a time", about, shown, words)])
    )


def scores_text(scores: PatchScores, *, names: Names | None = None, top: int = 10) -> RenderableType:
    """The sweep for the terminal: a table where it fits, and the leading places."""
    values = np.asarray(scores.effect, np.float64)
    what = {"denoise": "comes back", "noise": "goes"}[scores.mode]
    parts: list[RenderableType] = [Text(f"How much of the difference {what}", style="bold")]
    labels = [_named(axis, size, scores, names) for axis, size in zip(scores.over, values.shape, strict=True)]
    if values.ndim == 2 and values.shape[0] <= _WIDEST:  # turned: words are long, and stand better in rows
        parts += [heat_table(values.T, labels[1], labels[0], limit=1.0), Text()]
    size = np.abs(np.nan_to_num(values))
    for index in np.argsort(-size, axis=None, kind="stable")[:top]:
        place = np.unravel_index(index, values.shape)
        if size[place] < _NOTHING:
            break
        where = ", ".join(label[int(i)] for label, i in zip(labels, place, strict=True))
        parts.append(Text.assemble((f"{number(float(values[place])):>6}", "bold"), f"  {where}"))
    return Group(*parts)


def _named(axis: str, size: int, scores: PatchScores, names: Names | None) -> list[str]:
    known = {**scores.axis_labels(), **(names or {})}
    return list(known[axis]) if axis in known else [f"{axis} {i}" for i in range(size)]


def _two_axes(scores: PatchScores) -> tuple[Float[np.ndarray, "row column"], tuple[str, str]]:
    values = np.asarray(scores.effect, np.float64)
    if values.ndim == 1:
        return values[None], (scores.mode, scores.over[0])
    return values.mean(axis=tuple(range(2, values.ndim))), (scores.over[0], scores.over[1])
