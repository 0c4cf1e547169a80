"""A few numbers side by side, as bars with their values written out, and single results as ticks."""

from collections.abc import Sequence

import equinox as eqx

from mechjax.viz.html import Html, tag


class BarRow(eqx.Module):
    """One line of a bar chart.

    Attributes:
        name: What it is.
        value: How long the bar is.
        text: The value as it is written.
        strong: Whether the eye should go there.
        ticks: Single results behind the value, each drawn as a tick.
    """

    name: str = eqx.field(static=True)
    value: float = eqx.field(static=True)
    text: str = eqx.field(static=True)
    strong: bool = eqx.field(static=True, default=False)
    ticks: tuple[float, ...] = eqx.field(static=True, default=())


def bars(rows: Sequence[BarRow], *, caption: str) -> Html:
    """Bars from zero to the largest value; what is negative has no bar, only its number."""
    most = max((v for row in rows for v in (row.value, *row.ticks)), default=0.0) or 1.0

    def percent(value: float) -> str:
        return f"{100 * min(max(value / most, 0.0), 1.0):.2f}%"

    lines = []
    for row in rows:
        ticks = [tag("i", class_="tick", style=f"left:{percent(t)}") for t in row.ticks]
        bar = tag("div", tag("i", class_="bar", style=f"width:{percent(row.value)}"), ticks, class_="track")
        names = {"class_": "strong"} if row.strong else {}
        lines.append(
            tag("tr", tag("th", row.name, scope="row"), tag("td", bar), tag("td", row.text), **names)
        )
    return tag("table", tag("caption", caption), tag("tbody", lines), class_="bars")
