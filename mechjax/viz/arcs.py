"""A sentence with arcs above it: from the word that is looked at to the word that looks, one arc per head."""

from collections.abc import Mapping, Sequence

import equinox as eqx

from mechjax.viz.attention import shown
from mechjax.viz.html import Html, tag

_CHARACTER, _PADDING, _GAP = 8.6, 9.0, 5.0  # widths in a fixed-width font, so that no browser need be asked
_STEP, _LOWEST = 34.0, 44.0


class Arc(eqx.Module):
    """Information moving from one position to another.

    Attributes:
        start: Position that is looked at.
        end: Position that looks, where the arrow points.
        name: What moves it.
        share: How strongly, 0 to 1.
    """

    start: int = eqx.field(static=True)
    end: int = eqx.field(static=True)
    name: str = eqx.field(static=True)
    share: float = eqx.field(static=True)


def arcs(
    tokens: Sequence[str], moves: Sequence[Arc], *, caption: str, roles: Mapping[int, str] | None = None
) -> Html:
    """A sentence with arrows above it. The shorter an arc, the lower it stands.

    Args:
        tokens: The sentence, one string per position.
        moves: The arrows.
        caption: What they show, in one sentence.
        roles: What some positions are called.
    """
    names, roles = [shown(token) for token in tokens], roles or {}
    widths = [_CHARACTER * len(name) + 2 * _PADDING for name in names]
    lefts = [sum(widths[:i]) + _GAP * i for i in range(len(names))]
    middles = [left + width / 2 for left, width in zip(lefts, widths, strict=True)]
    ranked = sorted(moves, key=lambda arc: abs(middles[arc.end] - middles[arc.start]))
    floor = _LOWEST + _STEP * max(len(moves) - 1, 0) + 26.0
    wide, tall = lefts[-1] + widths[-1], floor + 52.0
    curves = [_curve(arc, middles, floor, _LOWEST + _STEP * rank) for rank, arc in enumerate(ranked)]
    words = [
        [
            tag("rect", x=f"{left:.1f}", y=f"{floor:.1f}", width=f"{width:.1f}", height="28", rx="6"),
            tag("text", name, x=f"{middle:.1f}", y=f"{floor + 19:.1f}"),
            tag("text", roles[i], x=f"{middle:.1f}", y=f"{floor + 44:.1f}", class_="under")
            if i in roles
            else None,
        ]
        for i, (name, left, width, middle) in enumerate(zip(names, lefts, widths, middles, strict=True))
    ]
    drawing = tag(
        "svg", tag("title", caption), curves, words, viewBox=f"-2 0 {wide + 4:.0f} {tall:.0f}", role="img",
        style=f"min-width:{0.72 * wide:.0f}px;max-width:{1.15 * wide:.0f}px",
    )  # fmt: skip
    return tag("figure", tag("figcaption", caption), tag("div", drawing, class_="scroll"), class_="arcs")


def _curve(arc: Arc, middles: Sequence[float], floor: float, height: float) -> Html:
    said = f"{arc.name} {100 * arc.share:.0f}%"
    width = f"stroke-width:{1.5 + 2.5 * arc.share:.1f}px"
    if arc.start == arc.end:  # the word looks at itself: a loop that leans aside, its name beside it
        x, foot, top = middles[arc.end], floor - 4.0, floor - 1.1 * height
        path = f"M{x - 2:.1f} {foot:.1f} C{x - 2:.1f} {top:.1f} {x - 40:.1f} {top:.1f} {x - 13:.1f} {foot - 5:.1f}"
        name = tag("text", said, x=f"{x - 72:.1f}", y=f"{(foot + 2 * top) / 3:.1f}", class_="over")
        return tag("g", tag("path", d=path, class_="arc", style=width), _point(x - 12, foot), name)
    # Where several arcs meet at one word, the small shift keeps their ends apart.
    start, end = middles[arc.start] + 4.0, middles[arc.end] - (5.0 if arc.end > arc.start else 0.0)
    top, foot = floor - height, floor - 4.0
    lean = min(abs(end - start) / 2, 40.0) * (1 if end >= start else -1)
    path = (
        f"M{start:.1f} {foot:.1f} C{start:.1f} {top:.1f} {start:.1f} {top:.1f} {start + lean:.1f} {top:.1f} "
        f"L{end - lean:.1f} {top:.1f} C{end:.1f} {top:.1f} {end:.1f} {top:.1f} {end:.1f} {foot - 5:.1f}"
    )
    name = tag("text", said, x=f"{(start + end) / 2:.1f}", y=f"{top - 6:.1f}", class_="over")
    return tag("g", tag("path", d=path, class_="arc", style=width), _point(end, foot), name)


def _point(x: float, y: float) -> Html:
    d = f"M{x - 4.5:.1f} {y - 7:.1f} L{x + 4.5:.1f} {y - 7:.1f} L{x:.1f} {y + 1:.1f} Z"
    return tag("path", d=d, class_="point")
