"""How well does each method find circuits that are known?

Every method of `judged_methods` scores the edges and nodes of every model of `ground_truth`, on fresh pairs of inputs
for each seed:

- AUROC: the chance that an edge of the circuit gets a larger size than one that is not in it, over all such pairs, ties
  as half (Mann and Whitney 1947); the same for nodes (heads and MLPs), which are in the circuit where one of their
  edges is. What carries the same in both prompts of every pair is left out.
- Pearson and rank correlation (Spearman) with the exact effects: of edges, or of nodes where a method scores no edges.
- Cost: passes of the model, a backward pass counted as two, and seconds without compilation.

Scores drawn at random stand beside them, the mean of many draws, and must read 0.5.

Everything runs in double precision: where softmaxes are saturated, as in compiled programs, gradients are smaller than
what float32 rounds. In correlations, what double precision rounds counts as 0 (`ROUNDED`), or its order, and with it
the ranks, would hang on the compiler.
"""

import time
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.base.progress import bar
from mechjax.base.records import Record
from mechjax.graph import Truth, agreement
from mechjax.studies.ground_truth import MODELS
from mechjax.studies.judged_methods import METHODS, Found

ROUNDED = 1e-14
"""Of the largest size: less is rounding. Programs' effects end near 1e-15 of it, and what should be 0 begins there."""


class Scoreboard(Record):
    """What every method found on every model, seed by seed.

    Attributes:
        edge_auroc: Of edges of the circuit against all others.
        node_auroc: Of nodes of the circuit against all others.
        pearson: Correlation with the exact scores of edges, or of nodes where there are none of edges.
        spearman: Correlation of ranks with theirs.
        seconds: Time for the scores of edges and of nodes; of the first seed with compilation.
        passes: How many passes of the model the scores of edges (else of nodes) take.
        models: Names (static).
        methods: Names (static).
    """

    edge_auroc: Float[np.ndarray, "model method seed"]
    node_auroc: Float[np.ndarray, "model method seed"]
    pearson: Float[np.ndarray, "model method seed"]
    spearman: Float[np.ndarray, "model method seed"]
    seconds: Float[np.ndarray, "model method seed"]
    passes: Float[np.ndarray, "model method seed"]
    models: tuple[str, ...] = eqx.field(static=True)
    methods: tuple[str, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of models and methods."""
        return {"model": self.models, "method": self.methods}


def scoreboard(
    models: Sequence[str] = tuple(MODELS), methods: Sequence[str] = tuple(METHODS), *, n_seeds: int = 5
) -> Scoreboard:
    """Judge methods on models whose circuits are known.

    Args:
        models: Names from `mechjax.studies.ground_truth.MODELS`.
        methods: Names from `mechjax.studies.judged_methods.METHODS`.
        n_seeds: How many draws of inputs (and of the basis) for each model.

    Raises:
        ArgumentError: A name that is not there, or no seed.
    """
    for what, asked, known in (("model", models, MODELS), ("method", methods, METHODS)):
        if unknown := [name for name in asked if name not in known]:
            raise ArgumentError(f"there is no {what} `{unknown[0]}`: there are {', '.join(known)}.")
    if n_seeds < 1:
        raise ArgumentError(f"n_seeds={n_seeds}: at least one draw of inputs is needed.")
    cells = np.zeros((len(_COLUMNS), len(models), len(methods), n_seeds))
    with bar("Judging methods", len(models)) as progress:
        for i, model in enumerate(models):
            progress.begin(model)
            for seed in range(n_seeds):
                key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(model.encode()))
                with jax.enable_x64(True):
                    cells[:, i, :, seed] = _judged(_widened(MODELS[model](seed)), methods, key).T
            jax.clear_caches()  # shapes are each model's own; Linux gives a process 65,530 maps, and programs take many
            progress.advance()
    columns = dict(zip(_COLUMNS, cells, strict=True))
    return Scoreboard(**columns, models=tuple(models), methods=tuple(methods))


_COLUMNS = ("edge_auroc", "node_auroc", "pearson", "spearman", "seconds", "passes")


class _Items(NamedTuple):
    """The edges, or the nodes, of a model."""

    inside: Bool[np.ndarray, " item"]
    counted: Bool[np.ndarray, " item"]
    effects: Float[np.ndarray, " item"]


def _widened(known: Truth) -> Truth:
    """The same in double precision."""
    wide = lambda x: x.astype(np.float64) if eqx.is_inexact_array(x) else x
    return jax.tree.map(wide, known)


def _judged(known: Truth, methods: Sequence[str], key: Key[Array, ""]) -> Float[np.ndarray, "method column"]:
    """One row per method, all against the same circuit and exact scores."""
    truth = _timed("exact", known, key)
    edges, nodes = _items(known, truth[0])
    rows = []
    for name in methods:
        method = METHODS[name]
        found, seconds = truth if name == "exact" else _timed(name, known, key)
        aurocs = _auroc(found.edges, edges), _auroc(found.nodes, nodes)
        compared = (found.nodes, nodes) if found.edges is None else (found.edges, edges)
        agree = _correlations(*compared, signed=method.signed)
        rows.append([*aurocs, *agree, seconds, method.passes(known.graph)])
    return np.array(rows, np.float64)


def _timed(name: str, known: Truth, key: Key[Array, ""]) -> tuple[Found, float]:
    """What a method finds, nothing in a model that it has no rules for, and the seconds that it takes."""
    start = time.perf_counter()
    try:
        found = jax.block_until_ready(METHODS[name].score(known, key))
    except UnsupportedModelError:
        return Found(), float("nan")
    return found, time.perf_counter() - start


def without_rounding(scores: Float[np.ndarray, "*draw item"]) -> Float[np.ndarray, "*draw item"]:
    """Scores with 0 in the place of what is no more than the rounding of the largest; NaN stays."""
    size = np.abs(scores)
    largest = np.nanmax(size, axis=-1, keepdims=True, initial=0)
    return np.where(size < ROUNDED * largest, 0, scores)


def _items(known: Truth, effects: Found) -> tuple[_Items, _Items]:
    """Edges and nodes, with exact scores: what of the circuit carries the same in both prompts does not count."""
    table, sends = known.graph.table, np.asarray(known.nodes)
    leaves = np.isin(np.arange(len(sends)), table[np.asarray(known.circuit), 0])
    counted = sends | ~leaves
    counted[0] = False  # the input
    return (
        _Items(np.asarray(known.varying), ~np.asarray(known.constant), np.asarray(effects.edges)),
        _Items(sends, counted, np.asarray(effects.nodes)),
    )


def _auroc(scores: Float[Array, "*draw item"] | None, items: _Items) -> float:
    """The mean over draws."""
    if scores is None:
        return float("nan")
    rows = np.atleast_2d(np.asarray(scores))[:, items.counted]
    return float(np.mean([auroc(row, items.inside[items.counted]) for row in rows]))


def _correlations(
    scores: Float[Array, "*draw item"] | None, items: _Items, *, signed: bool
) -> tuple[float, float]:
    """Pearson and Spearman with the exact effects, the means over draws, of the items that have scores."""
    rows = np.zeros((1, 0)) if scores is None else without_rounding(np.atleast_2d(np.asarray(scores)))
    there = ~np.isnan(rows[0])
    if there.sum() < 2:
        return float("nan"), float("nan")
    effects = without_rounding(items.effects)[there]
    effects = effects if signed else np.abs(effects)
    agree = [agreement(row[there], effects) for row in rows]
    return float(np.mean([one.pearson for one in agree])), float(np.mean([one.spearman for one in agree]))


def auroc(scores: Float[np.ndarray, " item"], inside: Bool[np.ndarray, " item"]) -> float:
    """The chance that what is inside has a larger size than what is not, ties as half; NaN where all are or none is."""
    n = int(inside.sum())
    if not 0 < n < len(inside):
        return float("nan")
    return float(agreement(scores, inside.astype(np.float32), n).auroc)
