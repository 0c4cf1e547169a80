"""Scores of nodes as heat maps: heads and MLPs by layer; units of MLPs, and nodes at spans, in rows of their own."""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from mechjax.attribution import Scores
from mechjax.base.display import largest
from mechjax.viz.attributed import decimals, expect, figure, made, place_of
from mechjax.viz.heatmap import heatmap, legend
from mechjax.viz.html import Html, tag
from mechjax.viz.page import Page, section

_PLACE = re.compile(r"([am])(\d+)(?:\.(\w+))?")
_MOST = 160  # rows of one map
_LOSES = "What the metric loses without each node"


def node_map(scores: Scores, *, n: int = 20, title: str = "What each node does") -> Page:
    """A page with scores of nodes as heat maps, and the `n` strongest by name.

    Heads and MLPs are shown layer by layer, units of MLPs below them. Where the graph takes positions apart, every node
    is a row, and spans are columns.

    Args:
        scores: Scores of nodes.
        n: How many to name.
        title: The page's heading.

    Raises:
        ArgumentError: Scores of edges.
    """
    expect(scores, "node", "circuit")
    graph = scores.graph
    values = np.asarray(scores.scores, np.float64).reshape(len(graph.nodes), -1)
    units = {name for own in graph.own_units for name in own}
    own = np.array([name in units for name in graph.nodes])
    if graph.spans:
        maps = _rows(graph.nodes, values, graph.spans, f"{_LOSES}, at each {place_of(graph)}")
    else:
        maps = _grid([graph.nodes[i] for i in np.flatnonzero(~own)], values[~own, 0])
    if units and not graph.spans:
        named = [graph.nodes[i] for i in np.flatnonzero(own)]
        maps += _rows(named, values[own], ["score"], f"{_LOSES}: units of MLPs, in colours of their own")
    told = largest(scores.scores, scores.over, n, scores.axis_labels())
    listed = tag("ol", [tag("li", f"{name}: {figure(value)}") for name, value in told], class_="fine")
    return Page(title, section(title, made(scores), *maps, f"The {len(told)} strongest:", listed))


def _grid(nodes: Sequence[str], values: Float[np.ndarray, " node"]) -> list[Html]:
    """Layers by heads and the MLP, and what the colours mean."""
    places = {name: said for name in nodes if (said := _PLACE.fullmatch(name))}
    column = {name: (said[3] or "MLP") for name, said in places.items()}
    columns = sorted(dict.fromkeys(column.values()), key=lambda c: (c == "MLP", len(c), c))
    layers = sorted({int(said[2]) for said in places.values()})
    table = np.full((len(layers), len(columns)), np.nan)
    names = np.full(table.shape, "", object)
    for name, value in zip(nodes, values, strict=True):
        if name in places:
            at = layers.index(int(places[name][2])), columns.index(column[name])
            table[at], names[at] = value, name
    full = _largest(table)
    map_ = heatmap(
        table, [f"layer {i}" for i in layers], columns, caption=_LOSES, digits=decimals(full),
        tip=lambda i, j: f"{names[i, j]}: {figure(table[i, j])}" if names[i, j] else "",
    )  # fmt: skip
    return [tag("div", map_, class_="wide"), _words(full)]


def _rows(
    nodes: Sequence[str], values: Float[np.ndarray, "node column"], columns: Sequence[str], caption: str
) -> list[Html]:
    """A row for each node, the strongest where there are too many to read, and what the colours mean."""
    strongest = np.sort(np.argsort(-np.nan_to_num(np.abs(values)).max(-1), kind="stable")[:_MOST])
    if len(strongest) < len(nodes):
        caption = f"{caption}: the {_MOST} strongest of {len(nodes):,}"
    names, values = [nodes[int(i)] for i in strongest], values[strongest]
    layers = [f"layer {said[2]}" if (said := _PLACE.fullmatch(name)) else "" for name in names]
    full = _largest(values)
    map_ = heatmap(
        values, names, columns, caption=caption, groups=layers, digits=decimals(full),
        tip=lambda i, j: f"{names[i]}, {columns[j]}: {figure(values[i, j])}",
    )  # fmt: skip
    return [tag("div", map_, class_="wide"), _words(full)]


def _largest(values: Float[np.ndarray, "row column"]) -> float:
    return float(np.abs(np.nan_to_num(values)).max(initial=0.0))


def _words(full: float) -> Html:
    return legend(f"{figure(-full)} hurts", "0 nothing", f"{figure(full)} helps")
