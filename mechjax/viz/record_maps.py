"""What each kind of record has to show as heat maps: a table, of which `scores_page` makes a page."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechjax.attribution import InformationFlow, NodeScores, SiteScores
from mechjax.patching import KnockoutScores, MediationEffects, PatchScores, PathScores, TraceScores
from mechjax.viz.attributed import figure

_EFFECT = ("hurts", "nothing", "helps")


@dataclass(frozen=True)
class Numbers:
    """Numbers with names of their axes."""

    values: Any
    axes: tuple[str, ...]


@dataclass(frozen=True)
class Shown:
    """A record as heat maps, which share their colours.

    Attributes:
        about: How it was made, in a sentence.
        caption: What a cell is.
        maps: For each heat map its heading, and what it shows.
        words: What the least, nothing and the most mean; None where numbers are sizes.
        names: For some axes, the name of each index.
        limit: The size that takes the full colour; None for the largest.
    """

    about: str
    caption: str
    maps: Mapping[str, Numbers]
    words: tuple[str, str, str] | None = _EFFECT
    names: Mapping[str, Any] | None = None
    limit: float | None = None


def _mean(values: Any) -> str:
    return figure(float(values.mean()))


def _patched(scores: PatchScores) -> Shown:
    base, other = ("corrupt", "clean") if scores.mode == "denoise" else ("clean", "corrupt")
    what = f"clean {float(scores.clean.mean()):.2f}, corrupt {float(scores.corrupt.mean()):.2f}"
    return Shown(
        f"Each cell is a run on the {base} prompt with one piece of the {other} run put in.",
        f"How much of the difference it carries (metric: {what})",
        {f"{scores.site}, one place at a time": Numbers(scores.effect, scores.over)},
        ("the other way", f"as the {base} run", f"as the {other} run"),
        limit=1.0,
    )


def _attributed(scores: SiteScores | NodeScores, maps: dict[str, Numbers]) -> Shown:
    sizes = "" if scores.reduce == "mean" else " Sizes only."
    return Shown(
        f"Method {scores.method}, ablation {scores.ablation}; the metric is {_mean(scores.clean)} in the clean run."
        f"{sizes}",
        "What the metric loses without each place",
        maps,
        names=dict(scores.labels),
    )


def _traced(scores: TraceScores) -> Shown:
    window = "one layer" if scores.window == 1 else f"{scores.window} layers"
    return Shown(
        f"Each cell is a run whose subject is noise, with the state of {window} as in the clean run.",
        f"What it gives back (metric: clean {_mean(scores.clean)}, with noise {_mean(scores.corrupt)})",
        {f"{scores.site}, restored": Numbers(scores.scores, ("layer", "pos"))},
        ("takes more", "nothing", "gives back"),
    )


def _mediated(effects: MediationEffects) -> Shown:
    parts = ("direct", "indirect", "interaction")
    ratio = " of the corrupt run's metric" if effects.scale == "ratio" else ""
    return Shown(
        f"The change of prompts does {_mean(effects['total'])}{ratio} in all. Of it, past each place of {effects.site} "
        "(direct), through it (indirect), and neither by itself (interaction):",
        "How far it moves the metric",
        {part: Numbers(effects[part], effects.over) for part in parts},
        ("down", "nothing", "up"),
    )


def _flow(flow: InformationFlow) -> Shown:
    """Nodes by streams: all queries, keys and values of a layer read the same one."""
    graph = flow.graph
    of = {}  # a stream -> one of its readers
    for i, reader in enumerate(graph.readers):
        layer = graph.columns[i] // sum(graph.reads.values())
        part = {"a": "heads", "m": "MLP"}.get(reader[0], reader)
        of.setdefault(reader if reader == "logits" else f"L{layer} {part}", i)
    node, reader, _ = graph.table.T
    values = np.full((len(graph.nodes), len(of)), np.nan)
    for column, i in enumerate(of.values()):
        values[node[reader == i], column] = np.asarray(flow.importance)[reader == i]
    return Shown(
        "What is read is a sum of what nodes wrote; each column says how near they bring it, and sums to one.",
        "How much of what is read comes from each node",
        {"What readers read": Numbers(values, ("node", "reads"))},
        None,
        names={"node": graph.nodes, "reads": tuple(of)},
    )


SHOWN: Mapping[type, Callable[[Any], Shown]] = {
    PatchScores: _patched,
    SiteScores: lambda s: _attributed(s, {s.site: Numbers(s.scores, s.over)}),
    NodeScores: lambda s: _attributed(s, {site: Numbers(s.scores[site], axes) for site, axes in s.axes}),
    TraceScores: _traced,
    MediationEffects: _mediated,
    InformationFlow: _flow,
    PathScores: lambda s: Shown(
        f"Paths from senders (rows) to receivers (columns), frozen on the way: {s.freeze}. The metric is "
        f"{_mean(s.clean)} in the clean run.",
        "What the metric loses where a sender's paths to a receiver are patched",
        {"From sender to receiver": Numbers(s.scores, ("sender", "receiver"))},
    ),
    KnockoutScores: lambda s: Shown(
        f"Attention is blocked in a window of {s.window} around each layer. The metric is {_mean(s.clean)} in the "
        "whole run.",
        "What the metric loses",
        {"Layers that carry it": Numbers(s.scores, ("layer",))},
    ),
}
"""Kind of record -> what it shows."""
