"""How well does each method find circuits that are known?

Every method scores every edge of every model of `ground_truth`, on fresh pairs of inputs for each seed:

- AUROC: the chance that an edge of the circuit gets a larger size than one that is not in it, over all such pairs, ties
  as half (Mann and Whitney 1947); the same for nodes, which are in the circuit where one of their edges is.
- Pearson and rank correlation (Spearman) with the exact effects of the edges.
- Cost: passes of the model, a backward pass counted as two, and seconds without compilation.

Scores drawn at random stand beside them, and must read 0.5.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.attribution import Scores, eap, eap_ig, exact
from mechjax.base.errors import ArgumentError
from mechjax.base.progress import bar
from mechjax.base.records import Record
from mechjax.graph import Graph, Truth, agreement
from mechjax.studies.ground_truth import MODELS

EdgesAndNodes = tuple[Scores, Scores]


@dataclass(frozen=True)
class Method:
    """A row of the scoreboard.

    Attributes:
        score: Scores of edges and of nodes, for a model and a key.
        passes: How many passes of the model its scores of edges take.
    """

    score: Callable[[Truth, Array], EdgesAndNodes]
    passes: Callable[[Graph], int]


def _random(known: Truth, key: Array) -> EdgesAndNodes:
    def draw(n: int, over: str) -> Scores:
        values = jax.random.normal(jax.random.fold_in(key, n), (n,), jnp.float32)
        return Scores(values, jnp.zeros(len(known.clean)), known.graph, (over,), "random", "resample", "mean")

    return draw(len(known.graph.edges), "edge"), draw(len(known.graph.nodes), "node")


def _exact(known: Truth, key: Array) -> EdgesAndNodes:
    over = lambda what: exact(*_pair(known), graph=known.graph, over=what)
    return over("edge"), over("node")


def _from_edges(method: Callable[..., Scores]) -> Callable[[Truth, Array], EdgesAndNodes]:
    """A method whose scores of nodes are sums over their edges."""

    def score(known: Truth, key: Array) -> EdgesAndNodes:
        edges = method(*_pair(known), graph=known.graph)
        return edges, edges.nodes()

    return score


def _pair(known: Truth) -> tuple:
    return known.model, known.clean, known.corrupt, known.metric


METHODS: dict[str, Method] = {
    "random": Method(_random, lambda graph: 0),
    "exact": Method(_exact, lambda graph: 2 + len(graph.edges)),
    "eap": Method(_from_edges(eap), lambda graph: 1 + 3),
    "eap_ig": Method(_from_edges(eap_ig), lambda graph: 2 + 5 * 3),
}
"""Name -> a method. Adding one is one line."""


class Scoreboard(Record):
    """What every method found on every model, seed by seed.

    Attributes:
        edge_auroc: Of edges of the circuit against all others.
        node_auroc: Of nodes of the circuit against all others.
        pearson: Correlation with the exact scores of edges.
        spearman: Correlation of ranks with theirs.
        seconds: Time for the scores of edges and of nodes; of the first seed with compilation.
        passes: How many passes of the model the scores of edges take.
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
        methods: Names from `METHODS`.
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
                cells[:, i, :, seed] = _judged(MODELS[model](seed), methods, key).T
            progress.advance()
    columns = dict(zip(_COLUMNS, cells, strict=True))
    return Scoreboard(**columns, models=tuple(models), methods=tuple(methods))


_COLUMNS = ("edge_auroc", "node_auroc", "pearson", "spearman", "seconds", "passes")


def _judged(known: Truth, methods: Sequence[str], key: Array) -> Float[np.ndarray, "method column"]:
    """One row per method, all against the same exact scores."""
    truth = exact(*_pair(known), graph=known.graph)
    inside, counted = np.asarray(known.varying), ~np.asarray(known.constant)
    sends = np.asarray(known.nodes)
    rows = []
    for name in methods:
        start = time.perf_counter()
        edges, nodes = jax.block_until_ready(METHODS[name].score(known, key))
        took = time.perf_counter() - start
        agrees = edges.compare(truth)
        rows.append(
            [
                auroc(np.asarray(edges.scores)[counted], inside[counted]),
                auroc(np.asarray(nodes.scores), sends),
                float(agrees.pearson),
                float(agrees.spearman),
                took,
                METHODS[name].passes(known.graph),
            ]
        )
    return np.array(rows, np.float64)


def auroc(scores: Float[np.ndarray, " item"], inside: Array | np.ndarray) -> float:
    """The chance that what is inside has a larger size than what is not, ties as half; NaN where all are or none is."""
    n = int(inside.sum())
    if not 0 < n < len(inside):
        return float("nan")
    return float(agreement(jnp.asarray(scores), jnp.asarray(inside, jnp.float32), n).auroc)
