"""Heat maps for the terminal: the numbers of a page, coloured so that they read on dark and on light backgrounds."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float
from rich.table import Table
from rich.text import Text

from mechjax.viz.heatmap import number


def heat_table(
    values: Float[Array, "row column"] | Float[np.ndarray, "row column"],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float | None = None,
) -> Table:
    """A table of coloured numbers for `rich`.

    Args:
        values: What to show. Shape (row, column).
        rows: Names of the rows, first row on top.
        columns: Names of the columns.
        limit: The size that is strongest; the largest size by default.
    """
    numbers = np.asarray(values, np.float64)
    sizes = np.abs(numbers[np.isfinite(numbers)])
    full = (limit if limit is not None else float(sizes.max(initial=0.0))) or 1.0
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in columns:
        table.add_column(Text(name), justify="right")  # as Text: names come from tokens, and are no markup
    for name, line in zip(rows, numbers, strict=True):
        table.add_row(Text(name, style="dim"), *(_cell(float(v), full) for v in line))
    return table


def _cell(value: float, full: float) -> Text:
    share = 0.0 if math.isnan(value) else min(abs(value) / full, 1.0)
    hue = "blue" if value >= 0 else "red"
    style = "dim" if share < 0.15 else hue if share < 0.55 else f"bold white on {hue}"
    return Text(f" {number(value)} ", style=style)
