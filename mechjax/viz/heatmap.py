"""Heat maps as tables: every cell holds its number as text, so eyes, screen readers and tests read the same thing.

Colours diverge from zero: one hue for what is positive, another for what is negative, paper for nothing. The style
sheet mixes them from one number per cell, which is how one table serves light and dark.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ShapeError
from mechjax.viz.html import Child, Html, tag

_DENSE = 10  # more columns than this are drawn small


def number(value: float, digits: int = 2) -> str:
    """Two decimals, or `digits`, with a real minus sign; a dash where there is no number."""
    if math.isnan(value):
        return "–"
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def shade(share: float) -> str:
    """How strong a colour is, in a word for the style sheet, which chooses the colour of text upon it."""
    return " hi" if share > 0.72 else " mid" if share > 0.5 else ""


def cell(
    value: float,
    limit: float,
    tip: str | None = None,
    *,
    quiet: bool = False,
    digits: int = 2,
    **attributes: str | None,
) -> Html:
    """One coloured cell. `limit` is the size that takes the full colour; a quiet cell is there only to be read."""
    if math.isnan(value):
        return tag("td", number(value), class_="gap", data_tip=tip, **attributes)
    share = min(abs(value) / limit, 1.0) if limit else 0.0
    return tag(
        "td",
        number(value, digits),
        class_=("n" if value < 0 else "p") + shade(share) + " quiet" * quiet,
        style=f"--v:{share:.3f}",
        data_tip=tip,
        **attributes,
    )


def heatmap(
    values: Float[Array, "row column"] | Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    caption: str,
    corner: str = "",
    under: Sequence[str] = (),
    groups: Sequence[str] = (),
    limit: float | None = None,
    tip: Callable[[int, int], str] | None = None,
    marked: Sequence[tuple[int, int]] = (),
    digits: int = 2,
) -> Html:
    """A table of coloured numbers.

    Args:
        values: What to show. Shape (row, column); NaN shows as a gap.
        rows: Names of the rows, first row on top.
        columns: Names of the columns.
        caption: What the table shows, in one sentence.
        corner: What rows and columns are, such as `"layer \N{RIGHTWARDS ARROW} position"`.
        under: A second line under the columns' names.
        groups: For each row what it belongs to; rows in a row that belong together share one name at their left.
        limit: The size that takes the full colour; the largest size by default.
        tip: What to say of a cell when it is pointed at, given its row and column.
        marked: Cells with a frame around them.
        digits: Decimals of the numbers.

    Raises:
        ShapeError: The names do not fit the shape of `values`.
    """
    numbers = np.asarray(values, np.float64)
    unfit = len(under) not in (0, len(columns)) or len(groups) not in (0, len(rows))
    if numbers.shape != (len(rows), len(columns)) or unfit:
        raise ShapeError(
            f"a heat map of shape (row, column) = {numbers.shape} was given {len(rows)} row names, {len(columns)} "
            f"column names, {len(under)} second lines and {len(groups)} groups: give one name per row and per column."
        )
    sizes = np.abs(numbers[np.isfinite(numbers)])
    full = limit if limit is not None else float(sizes.max(initial=0.0))
    seconds = under or [None] * len(columns)
    heads = [
        tag("th", tag("b", name), tag("small", second) if second else None, scope="col")
        for name, second in zip(columns, seconds, strict=True)
    ]
    lines = []
    for i, row in enumerate(rows):
        cells = [
            cell(
                float(v),
                full,
                tip and tip(i, j),
                digits=digits,
                data_mark="1" if (i, j) in marked else None,
            )
            for j, v in enumerate(numbers[i])
        ]
        lines.append((tag("th", row, scope="row"), cells))
    dense = " dense" if len(columns) > _DENSE else ""
    top = tag("thead", tag("tr", tag("td", corner, class_="corner", colspan=2 if groups else None), heads))
    table = tag("table", top, _bodies(lines, groups), class_=f"heat{dense}", aria_label=caption)
    return tag("figure", tag("figcaption", caption), tag("div", table, class_="scroll"), class_="map")


def _bodies(lines: Sequence[Child], groups: Sequence[str]) -> list[Html]:
    """The rows, group by group."""
    if not groups:
        return [tag("tbody", [tag("tr", line) for line in lines])]
    found = []
    for name, run in itertools.groupby(zip(groups, lines, strict=True), key=lambda pair: pair[0]):
        (_, first), *rest = run
        head = tag("th", name, scope="rowgroup", rowspan=1 + len(rest), class_="group")
        found.append(tag("tbody", tag("tr", head, first), [tag("tr", line) for _, line in rest]))
    return found


def legend(low: str, middle: str, high: str) -> Html:
    """What the colours of a heat map mean, in words under a strip of them."""
    words = tag("div", tag("span", low), tag("span", middle), tag("span", high))
    return tag("div", tag("i", aria_hidden="true"), words, class_="legend")
