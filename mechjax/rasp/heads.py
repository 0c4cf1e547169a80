"""Attention heads that select: a predicate as a bilinear form of one-hot keys and queries.

The score of a key is `coldness` where the predicate holds and 0 where it does not, so that softmax picks the selected
keys alone and shares itself out among them equally. A side that the predicate does not hang on is a bias and reads
nothing. Where nothing may be selected, the head has a sink (a score of a key that is not there) of half the coldness,
which then takes the whole pattern: the head writes the difference to the default, and the layer's bias the default.
With a sink as high as a selected key, d selected keys together get d / (1 + d), which counts them.

Lindner et al. 2023, "Tracr", arXiv:2301.05062, section 3, gives a token before the text the sink's role, which then
carries values of its own that later layers must not read; a sink has none.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from mechjax.rasp.expressions import NOTHING, Aggregate, Indices, Select
from mechjax.rasp.values import absent, given
from mechjax.rasp.variables import Variable


@dataclass(frozen=True)
class Side:
    """Queries, keys or values of one head.

    Attributes:
        reads: The variable that they are made of; None where they are the same everywhere.
        W: Their weights on it. Shape (size, d).
        b: Their bias. Shape (d,).
    """

    reads: Variable | None
    W: Float[np.ndarray, "size d"]
    b: Float[np.ndarray, " d"]


@dataclass(frozen=True)
class Head:
    """One head.

    Attributes:
        q, k, v: What it makes of the stream.
        writes: The variable that it writes.
        W_O: Shape (d, size).
        b_O: What the layer adds for it. Shape (size,).
        sink: The score of a key that is not there, in units of the coldness; None where there is none.
        tolerance: The share of a query's attention that may go astray before what reads the head reads another value.
    """

    q: Side
    k: Side
    v: Side
    writes: Variable
    W_O: Float[np.ndarray, "d size"]
    b_O: Float[np.ndarray, " size"]
    sink: float | None
    tolerance: float

    def astray(self, coldness: float, max_length: int) -> float:
        """At most this share of a query's attention goes to keys that it does not select, or to the sink instead."""
        margin = 1.0 if self.sink in (None, 1.0) else self.sink
        return max_length * float(np.exp(-coldness * margin))

    def coldest(self, max_length: int) -> float:
        """The least coldness at which that is within the tolerance."""
        return float(np.log(max_length / self.tolerance)) * (1.0 if self.sink in (None, 1.0) else 2.0)


def mixing(
    node: Aggregate,
    sides: tuple[Variable, Variable],
    source: Variable,
    target: Variable,
    tolerance: float,
    *,
    causal: bool,
) -> Head:
    """The head of an Aggregate; `sides` are the variables of its keys and queries."""
    q, k = _selecting(node.selector, *sides, causal)
    W_O = np.stack([target.encode(value) for value in source.values]) if not target.numerical else np.eye(1)
    b_O, sink, b_V = np.zeros(target.size), None, np.zeros(source.size)
    if node.default is not NOTHING:
        b_O, sink = target.encode(node.default), 0.5
        if target.numerical:
            b_V = -b_O
        else:
            W_O = W_O - b_O
    return Head(q, k, Side(source, np.eye(source.size), b_V), target, W_O, b_O, sink, tolerance)


def counting(
    selector: Select, sides: tuple[Variable, Variable], target: Variable, tolerance: float, *, causal: bool
) -> Head:
    """The head of a SelectorWidth: it writes d / (1 + d)."""
    q, k = _selecting(selector, *sides, causal)
    return Head(q, k, _constant(), target, np.eye(1), np.zeros(1), 1.0, tolerance)


def _selecting(selector: Select, keys: Variable, queries: Variable, causal: bool) -> tuple[Side, Side]:
    """Queries and keys whose inner product is 1 where the predicate holds, else 0."""
    pairs = [[_holds(selector, key, query, causal) for key in keys.values] for query in queries.values]
    holds = np.array(pairs, float)
    met = holds[~np.isnan(holds)]
    if (met == met[:1]).all():
        return _constant(), _constant(float(met[0]) if len(met) else 0.0)
    holds = np.nan_to_num(holds)
    if (holds == holds[:1]).all():
        return _constant(), _reading(keys, holds[:1].T)
    if (holds == holds[:, :1]).all():
        return _reading(queries, holds[:, :1]), _constant()
    if len(keys.values) <= len(queries.values):
        return _reading(queries, holds), _reading(keys, np.eye(keys.size))
    return _reading(queries, np.eye(queries.size)), _reading(keys, holds.T)


def _holds(selector: Select, key: Any, query: Any, causal: bool) -> float:
    """Whether a query selects a key; NaN where they never meet."""
    unseen = (
        causal
        and isinstance(selector.keys, Indices)
        and isinstance(selector.queries, Indices)
        and key > query
    )
    held = given(selector.predicate, key, query)
    return np.nan if unseen or absent(held) else float(bool(held))


def _reading(variable: Variable, W: np.ndarray) -> Side:
    return Side(variable, W, np.zeros(W.shape[1]))


def _constant(value: float = 1.0) -> Side:
    return Side(None, np.zeros((0, 1)), np.array([value]))
