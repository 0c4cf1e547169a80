"""Records of patching and attribution as pages of heat maps, and a patching sweep as text."""

from collections.abc import Mapping, Sequence

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.patching import PatchScores
from mechjax.viz.attributed import decimals, figure
from mechjax.viz.heatmap import heatmap, legend, number
from mechjax.viz.html import Html, escape, tag
from mechjax.viz.page import Page, section
from mechjax.viz.record_maps import SHOWN, Numbers
from mechjax.viz.text import heat_table

_WIDEST = 16  # columns that still fit a terminal
_MOST = 64  # rows or columns of a heat map
_NOTHING = 0.005  # rounds to 0.00

Names = Mapping[str, Sequence[str]]


def scores_page(scores: Record, *, title: str | None = None, names: Names | None = None) -> Page:
    """A page with the heat maps of a record of `mj.patching` or `mj.attribution`.

    Of more than two axes the first two are shown, each cell by the place along the others that is largest in size. Of
    a long axis the places that hold the largest numbers are shown, in order.

    Args:
        scores: What to show. Scores of edges and nodes of a graph have views of their own, `mj.viz.circuit` and
            `mj.viz.node_map`.
        title: The page's heading; by default the record's kind.
        names: For some axes, the name of each index (`{"pos": tokenizer.str_tokens(prompt)}`).

    Raises:
        ArgumentError: A record that has no such view.
    """
    kind = next((kind for kind in SHOWN if isinstance(scores, kind)), None)
    if kind is None:
        raise ArgumentError(
            f"no heat map of a {type(scores).__name__}: there are those of "
            f"{', '.join(kind.__name__ for kind in SHOWN)}; mj.viz.circuit draws scores of edges, mj.viz.node_map "
            "shows scores of nodes."
        )
    shown = SHOWN[kind](scores)
    sizes = [float(np.abs(np.nan_to_num(part.values)).max(initial=0.0)) for part in shown.maps.values()]
    full = max(sizes, default=0.0) if shown.limit is None else shown.limit
    known = {**(shown.names or {}), **scores.axis_labels(), **(names or {})}
    parts = [
        section(name, _map(part, known, shown.caption, full, 2 if shown.limit else decimals(full)))
        for name, part in shown.maps.items()
    ]
    low, middle, high = shown.words or ("", "", "")
    words = legend(f"{figure(-full)} {low}", f"0 {middle}", f"{figure(full)} {high}") if shown.words else None
    title = title or kind.__name__
    body = tag("div", parts, class_=None if words else "sizes")
    return Page(title, escape([tag("h1", title), tag("p", shown.about), body, words]))


def _map(part: Numbers, names: Names, caption: str, full: float, digits: int) -> Html:
    """One heat map."""
    values = np.asarray(part.values, np.float64)
    axes = part.axes if values.ndim > 1 else ("one", *part.axes)
    values = values if values.ndim > 1 else values[None]
    labels = [_named(axis, size, names) for axis, size in zip(axes, values.shape, strict=True)]
    others = values.reshape(*values.shape[:2], -1)
    which = np.abs(np.nan_to_num(others)).argmax(-1)
    table = np.take_along_axis(others, which[..., None], -1)[..., 0]
    if values.ndim > 2:
        caption = f"{caption}: the largest over {' and '.join(axes[2:])}"
    size = np.abs(np.nan_to_num(table))
    kept = [np.sort(np.argsort(-size.max(1 - axis), kind="stable")[:_MOST]) for axis in (0, 1)]
    for axis, have, own in zip(axes, table.shape, kept, strict=False):
        caption += f"; of {have:,} {axis} the {_MOST} with the largest" if have > len(own) else ""
    table, which = table[np.ix_(*kept)], which[np.ix_(*kept)]
    rows, columns = ([label[i] for i in own] for label, own in zip(labels, kept, strict=False))

    def tip(i: int, j: int) -> str:
        place = np.unravel_index(which[i, j], values.shape[2:]) if values.ndim > 2 else ()
        rest = [label[int(k)] for label, k in zip(labels[2:], place, strict=True)]
        said = ", ".join(word for word in (rows[i], columns[j], *rest) if word)
        return f"{said}: {number(float(table[i, j]), max(digits, 2))}"

    map_ = heatmap(table, rows, columns, caption=caption, limit=full, digits=digits, tip=tip)
    return tag("div", map_, class_="wide")


def scores_text(scores: PatchScores, *, names: Names | None = None, top: int = 10) -> RenderableType:
    """The sweep for the terminal: a table where it fits, and the leading places."""
    values = np.asarray(scores.effect, np.float64)
    what = {"denoise": "comes back", "noise": "goes"}[scores.mode]
    parts: list[RenderableType] = [Text(f"How much of the difference {what}", style="bold")]
    known = {**scores.axis_labels(), **(names or {})}
    labels = [_named(axis, size, known) for axis, size in zip(scores.over, values.shape, strict=True)]
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


def _named(axis: str, size: int, names: Names) -> list[str]:
    return list(names[axis]) if axis in names else [f"{axis} {i}" * (axis != "one") for i in range(size)]
