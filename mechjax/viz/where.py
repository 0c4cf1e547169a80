"""Where scores are: a heat map of layers by spans, for graphs that take positions apart."""

import numpy as np

from mechjax.attribution import Scores
from mechjax.base.errors import ArgumentError, did_you_mean
from mechjax.graph import Graph
from mechjax.viz.attributed import decimals, figure, place_of
from mechjax.viz.heatmap import heatmap
from mechjax.viz.html import Html, tag


def where(scores: Scores, chosen: int | None = None) -> Html:
    """The heat map, logits on top as in the drawing of edges.

    Args:
        scores: Scores of edges, of a graph with spans.
        chosen: The span to frame.
    """
    graph = scores.graph
    _, reader, span = graph.table.T
    layer = graph.columns[reader] // sum(graph.reads.values())  # the logits come after the last
    sizes = np.zeros((graph.n_layers + 1, len(graph.spans)))
    np.add.at(sizes, (layer, span), np.abs(np.nan_to_num(np.asarray(scores.scores, np.float64))))
    values, rows = sizes[::-1], ["logits", *(f"layer {i}" for i in reversed(range(graph.n_layers)))]
    said = (
        f"Where: sizes of scores, added up over the edges that are read at a layer and a {place_of(graph)}. They say "
        "where to look, not what the metric would lose."
    )
    map_ = heatmap(
        values, rows, graph.spans, caption=said, digits=decimals(float(values.max())),
        marked=[] if chosen is None else [(row, chosen) for row in range(len(rows))],
        tip=lambda i, j: f"{rows[i]} @ {graph.spans[j]}: {figure(values[i, j]).lstrip('+')}",
    )  # fmt: skip
    return tag("div", map_, class_="sizes wide")


def span_of(graph: Graph, at: str | int | None) -> int | None:
    """The place of a span, by its name; None for all.

    Raises:
        ArgumentError: The graph has no such span.
    """
    if at is None or str(at) in graph.spans:
        return None if at is None else graph.spans.index(str(at))
    if not graph.spans:
        raise ArgumentError(
            f"at={at!r}: these scores are of a graph that sums positions, so none is at one of them: take positions "
            "apart with mj.graph.build(model, positions=...), and score again."
        )
    have = ", ".join(graph.spans) if graph.named else f"positions 0 to {len(graph.spans) - 1}"
    raise ArgumentError(f"at={at!r}: the graph has {have}.{did_you_mean(str(at), graph.spans)}")
