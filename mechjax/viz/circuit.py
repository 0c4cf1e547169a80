"""Scores of edges as a drawing with a table beside it: what helps, what hurts, and where."""

import numpy as np
from jaxtyping import Float

from mechjax.attribution import Scores
from mechjax.base.errors import ArgumentError
from mechjax.graph import Graph
from mechjax.viz.attributed import expect, figure, made, place_of
from mechjax.viz.edge_graph import Drawn, edge_graph, width
from mechjax.viz.heatmap import shade
from mechjax.viz.html import Html, tag
from mechjax.viz.page import Page, section
from mechjax.viz.where import span_of, where

_OTHERS = 3  # spans that are named beside the strongest one


def circuit(
    scores: Scores, *, n: int = 100, at: str | int | None = None, title: str = "The strongest edges"
) -> Page:
    """A page that draws the `n` strongest edges, with a table of them beside the drawing.

    Blue edges help the metric and orange ones hurt it; the larger the score, the wider the edge. Pointing at an edge,
    a node or a row of the table shows what belongs together. Where the graph takes positions apart, a heat map of
    layers by spans comes first, and of each pair of a node and a reader the edge is drawn at the span where it is
    strongest: scores of single edges do not add up, but for gradients.

    Args:
        scores: Scores of edges.
        n: How many edges, the largest in size; those that are zero are never drawn.
        at: A span, or a position, whose edges alone are drawn; None for all.
        title: The page's heading.

    Raises:
        ArgumentError: Scores of nodes, no edge asked for, or a span that the graph does not have.
    """
    expect(scores, "edge", "node_map")
    if n < 1:
        raise ArgumentError(f"n={n} edges asked for: a drawing needs at least one.")
    graph, chosen = scores.graph, span_of(scores.graph, at)
    apart = np.asarray(scores.scores, np.float64).reshape(-1, max(len(graph.spans), 1))
    seen = slice(None) if chosen is None else slice(chosen, chosen + 1)
    shown = np.zeros_like(apart)
    shown[:, seen] = np.nan_to_num(apart[:, seen])
    span = np.abs(shown).argmax(-1)
    values = shown[np.arange(len(shown)), span]
    order = [int(i) for i in np.argsort(-np.abs(values), kind="stable")[:n] if values[i]]
    full = max((abs(float(values[i])) for i in order), default=1.0)
    drawn = [_drawn(graph, rank, i, shown[i], full) for rank, i in enumerate(order)]
    known = int((~np.isnan(apart[:, seen])).any(-1).sum())
    of_all = f"The {len(order):,} strongest of {known:,} {_kind(graph, chosen)}"
    held, total = np.abs(values[order]).sum(), np.abs(shown).sum()
    there = "" if chosen is None else " there"
    about = (
        f"{of_all}; together they hold {held / total if total else 0.0:.0%} of the size of all scores{there}."
    )
    drawing = edge_graph(graph.nodes, graph.readers, drawn, caption=of_all)
    figures = tag("figure", tag("div", drawing, class_="scroll"), _key(full))
    table = _table(drawn, values[order], [graph.spans[span[i]] for i in order] if graph.spans else [], full)
    map_ = where(scores, chosen) if graph.spans else None
    return Page(
        title, section(title, made(scores), map_, about, tag("div", figures, table, class_="circuit"))
    )


def _kind(graph: Graph, chosen: int | None) -> str:
    """What is counted."""
    if chosen is not None:
        return f"edges at {graph.spans[chosen]}"
    if not graph.spans:
        return "edges"
    return f"pairs of a node and a reader, each at the {place_of(graph)} where it is strongest"


def _drawn(graph: Graph, rank: int, pair: int, values: Float[np.ndarray, " span"], full: float) -> Drawn:
    """A pair of a node and a reader, by its strongest span; others are told where it is pointed at."""
    node, reader, _ = graph.table[pair * len(values)]
    name = f"{graph.nodes[node]}->{graph.readers[reader]}"
    first, *others = np.argsort(-np.abs(values), kind="stable")[: 1 + _OTHERS]
    told = ", ".join(f"@ {graph.spans[s]} {figure(float(values[s]))}" for s in others if values[s])
    place = f" @ {graph.spans[first]}" if graph.spans else ""
    said = f"{name}{place}: {figure(float(values[first]))}{f' ({told})' if told else ''}"
    return Drawn(rank, graph.nodes[node], graph.readers[reader], float(values[first]) / full, said)


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


def _table(edges: list[Drawn], values: Float[np.ndarray, " edge"], spans: list[str], full: float) -> Html:
    """The edges, with their spans where there are any."""
    lines = []
    for edge, value, span in zip(edges, values, spans or [None] * len(edges), strict=True):
        name, _, side = edge.reader.partition("<")
        share = abs(value) / full
        number = tag(
            "td", figure(value), class_=("n" if value < 0 else "p") + shade(share), style=f"--v:{share:.3f}"
        )
        reads = tag("td", name, tag("b", side.rstrip(">"), class_="side") if side else None)
        place = None if span is None else tag("td", span, class_="span")
        lines.append(tag("tr", tag("td", edge.node), reads, place, number, data_edge=edge.number))
    words = ("sends", "reads", *["at"] * bool(spans), "score")
    heads = tag("tr", [tag("th", word, scope="col") for word in words])
    table = tag("table", tag("thead", heads), tag("tbody", lines), class_="edges")
    return tag("div", table, class_="list", tabindex="0", aria_label="The edges, the strongest first")
