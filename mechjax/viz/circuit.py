"""Scores of edges as a drawing with a table beside it, and scores of nodes as a heat map: what helps, what hurts."""

import math
import re

import numpy as np

from mechjax.attribution import Scores
from mechjax.base.display import largest
from mechjax.base.errors import ArgumentError
from mechjax.viz.edge_graph import Drawn, edge_graph, width
from mechjax.viz.heatmap import heatmap, legend, shade
from mechjax.viz.html import Html, tag
from mechjax.viz.page import Page, section

_PLACE = re.compile(r"([am])(\d+)(?:\.(\w+))?")


def circuit(scores: Scores, *, n: int = 100, title: str = "The strongest edges") -> Page:
    """A page that draws the `n` strongest edges, with a table of them beside the drawing.

    Blue edges help the metric and orange ones hurt it; the larger the score, the wider the edge. Pointing at an edge,
    a node or a row of the table shows what belongs together.

    Args:
        scores: Scores of edges.
        n: How many edges, the largest in size; those that are zero are never drawn.
        title: The page's heading.

    Raises:
        ArgumentError: Scores of nodes, or no edge asked for.
    """
    _expect(scores, "edge", "node_map")
    if n < 1:
        raise ArgumentError(f"n={n} edges asked for: a drawing needs at least one.")
    graph, values = scores.graph, np.nan_to_num(np.asarray(scores.scores, np.float64))
    order = [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:n] if values[i]]
    full = max((abs(float(values[i])) for i in order), default=1.0)
    edges = [
        Drawn(rank, node, reader, float(values[i]) / full, f"{node}->{reader}: {figure(values[i])}")
        for rank, i in enumerate(order)
        for node, _, reader in [graph.edges[i].partition("->")]
    ]
    held, total = np.abs(values[order]).sum(), np.abs(values).sum()
    of_all = f"The {len(order):,} strongest of {len(values):,} edges"
    about = f"{of_all}; together they hold {held / total if total else 0.0:.0%} of the size of all scores."
    drawing = edge_graph(graph.nodes, graph.readers, edges, caption=of_all)
    figures = tag("figure", tag("div", drawing, class_="scroll"), _key(full))
    table = _table(edges, [values[i] for i in order], full)
    body = section(title, _made(scores), about, tag("div", figures, table, class_="circuit"))
    return Page(title, body)


def node_map(scores: Scores, *, n: int = 20, title: str = "What each node does") -> Page:
    """A page with scores of nodes as a heat map, layer by head and MLP, and the `n` strongest by name.

    Args:
        scores: Scores of nodes.
        n: How many to name.
        title: The page's heading.

    Raises:
        ArgumentError: Scores of edges.
    """
    _expect(scores, "node", "circuit")
    places = {name: _PLACE.fullmatch(name) for name in scores.graph.nodes}
    column = {name: (said[3] or "MLP") for name, said in places.items() if said}
    columns = sorted(dict.fromkeys(column.values()), key=lambda c: (c == "MLP", len(c), c))
    rows = sorted({int(said[2]) for said in places.values() if said})
    values = np.full((len(rows), len(columns)), np.nan)
    names = np.full(values.shape, "", object)
    for (name, said), value in zip(places.items(), np.asarray(scores.scores), strict=True):
        if said:
            at = rows.index(int(said[2])), columns.index(column[name])
            values[at], names[at] = float(value), name
    told = [
        f"{name}: {figure(value)}"
        for name, value in largest(scores.scores, scores.over, n, scores.axis_labels())
    ]
    full = float(np.nanmax(np.abs(values), initial=0.0))
    digits = max(0, 1 - math.floor(math.log10(full))) if full else 0
    shown = heatmap(
        values, [f"layer {i}" for i in rows], columns, caption="What the metric loses without each node",
        digits=digits,
        tip=lambda i, j: f"{names[i, j]}: {figure(values[i, j])}" if names[i, j] else "",
    )  # fmt: skip
    words = legend(f"{figure(-full)} hurts", "0 nothing", f"{figure(full)} helps")
    listed = tag("ol", [tag("li", line) for line in told], class_="fine")
    return Page(title, section(title, _made(scores), shown, words, f"The {len(told)} strongest:", listed))


def figure(value: float) -> str:
    """Three digits with a sign: scores may be small, and their sign is what they say first."""
    return f"{value:+.3g}".replace("-", "\N{MINUS SIGN}") if value else "0"


def _expect(scores: Scores, over: str, other: str) -> None:
    if scores.over != (over,):
        raise ArgumentError(
            f"these are scores over {', '.join(scores.over)}, and this view shows scores over {over}: use "
            f"mj.viz.{other}."
        )


def _made(scores: Scores) -> str:
    size = {"mean": "", "abs_of_mean": " Sizes only.", "mean_of_abs": " Sizes only."}[scores.reduce]
    return (
        f"Method {scores.method}, ablation {scores.ablation}; the metric is {figure(float(scores.clean.mean()))} in "
        f"the clean run.{size}"
    )


def _key(full: float) -> Html:
    """What colour, width and letters mean."""
    line = lambda sign, share: tag(
        "svg", tag("path", d="M2 7H34", style=f"stroke-width:{width(share):.1f}px"), class_=f"edge {sign}",
        viewBox="0 0 36 14", aria_hidden="true",
    )  # fmt: skip
    words = [
        (line("p", 0.5), "helps the metric"),
        (line("n", 0.5), "hurts it"),
        (line("size", 1.0), f"{figure(full).lstrip('+')}"),
        (line("size", 0.1), f"{figure(full / 10).lstrip('+')}"),
        (tag("b", "q k v", class_="sides"), "read by queries, keys, values"),
        (tag("i", "·", class_="dot"), "no edge shown"),
    ]
    return tag("p", [tag("span", mark, word) for mark, word in words], class_="key")


def _table(edges: list[Drawn], values: list[float], full: float) -> Html:
    lines = []
    for edge, value in zip(edges, values, strict=True):
        name, _, side = edge.reader.partition("<")
        share = abs(value) / full
        number = tag(
            "td", figure(value), class_=("n" if value < 0 else "p") + shade(share), style=f"--v:{share:.3f}"
        )
        reads = tag("td", name, tag("b", side.rstrip(">"), class_="side") if side else None)
        lines.append(tag("tr", tag("td", edge.node), reads, number, data_edge=edge.number))
    heads = tag("tr", [tag("th", word, scope="col") for word in ("sends", "reads", "score")])
    table = tag("table", tag("thead", heads), tag("tbody", lines), class_="edges")
    return tag("div", table, class_="list", tabindex="0", aria_label="The edges, the strongest first")
