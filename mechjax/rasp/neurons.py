"""Neurons of a ReLU layer that compute what a program maps position by position.

- Of one category: a neuron per value, which writes what the function gives.
- Of two: a neuron per pair, `relu(x_i + y_j - 1)`.
- Of a number, whose values v_0 < v_1 < ... are known: what v_0 gives is a bias, and between each two values a ramp
  `relu(s (x - a)) - relu(s (x - a) - 1)` adds the difference. Slopes and edges of ramps have few bits, so that x less
  the edge is exact in float32, and each ramp is as steep as its own two values need.
- Of two numbers, linearly: `x = relu(x) - relu(-x)`, for negative numbers too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from mechjax.base.errors import ArgumentError
from mechjax.rasp.expressions import LinearSequenceMap, Map, SequenceMap
from mechjax.rasp.values import absent, given
from mechjax.rasp.variables import Variable

_CLOSEST = 1e-4
"""Numbers that are closer than this, relative to their size, cannot be told apart reliably in float32."""


@dataclass(frozen=True)
class Neurons:
    """Some neurons of a layer.

    Attributes:
        reads: The variables that they read.
        W_in: Their weights on each of these. Shapes (size, neuron).
        b_in: Shape (neuron,).
        writes: The variable that they write.
        W_out: Shape (neuron, size).
        b_out: What the layer adds for them. Shape (size,).
    """

    reads: tuple[Variable, ...]
    W_in: tuple[Float[np.ndarray, "_ neuron"], ...]
    b_in: Float[np.ndarray, " neuron"]
    writes: Variable
    W_out: Float[np.ndarray, "neuron size"]
    b_out: Float[np.ndarray, " size"]


def looking_up(node: Map, source: Variable, target: Variable) -> Neurons:
    """A map of a category."""
    there = [(i, y) for i, x in enumerate(source.values) if not absent(y := given(node.fn, x))]
    W_in = np.eye(source.size)[:, [i for i, _ in there]]
    return _neurons((source,), (W_in,), np.zeros(len(there)), target, [target.encode(y) for _, y in there])


def looking_up_pairs(node: SequenceMap, first: Variable, second: Variable, target: Variable) -> Neurons:
    """A map of two categories."""
    columns, written = [], []
    for i, x in enumerate(first.values):
        for j, y in enumerate(second.values):
            value = given(node.fn, x, y)
            if not absent(value) and (row := target.encode(value)).any():
                columns.append((i, j))
                written.append(row)
    left, right = np.array(columns, int).reshape(-1, 2).T
    W_in = np.eye(first.size)[:, left], np.eye(second.size)[:, right]
    return _neurons((first, second), W_in, np.full(len(columns), -1.0), target, written)


def adding(node: LinearSequenceMap, first: Variable, second: Variable, target: Variable) -> Neurons:
    """A weighted sum of two numbers."""
    W_in = np.array([[1.0, -1.0, 0.0, 0.0]]), np.array([[0.0, 0.0, 1.0, -1.0]])
    a, b = node.weight_first, node.weight_second
    return _neurons((first, second), W_in, np.zeros(4), target, np.array([[a], [-a], [b], [-b]], float))


def stepping(
    label: str, source: Variable, target: Variable, numbers: Iterable[float], given: Sequence[Any]
) -> Neurons:
    """A map of a number: `numbers`, in order, and the value that each gives (absent ones take a neighbour's)."""
    there = [(x, target.encode(y)) for x, y in zip(numbers, given, strict=True) if not absent(y)]
    slopes, edges, written = [], [], []
    for (low, before), (high, after) in pairwise(there):
        if (before == after).all():
            continue
        if high - low < _CLOSEST * max(1.0, abs(low), abs(high)):
            raise ArgumentError(
                f"`{label}` cannot be compiled: it gives different values for {low:.6g} and {high:.6g}, which are too "
                f"close to tell apart in float32 (at least {_CLOSEST:g} of their size). Compile for shorter inputs, or "
                "scale what it reads."
            )
        slope = 2.0 ** np.ceil(np.log2(2 / (high - low)))
        edge = np.round(((low + high) * slope / 2 - 0.5) * 8) / 8  # in units of the ramp's width
        slopes += [slope, slope]
        edges += [edge, edge + 1]
        written += [after - before, before - after]
    W_in = np.array(slopes).reshape(1, -1)
    return _neurons((source,), (W_in,), -np.array(edges), target, written, there[0][1])


def _neurons(
    reads: tuple[Variable, ...],
    W_in: tuple[np.ndarray, ...],
    b_in: np.ndarray,
    target: Variable,
    written: Any,
    b_out: np.ndarray | None = None,
) -> Neurons:
    W_out = np.array(written, float).reshape(-1, target.size)
    return Neurons(reads, W_in, b_in, target, W_out, np.zeros(target.size) if b_out is None else b_out)


def room(numbers: Sequence[float], given: Sequence[Any]) -> float:
    """How far a number may be off before a ramp between two that give different values notices."""
    there = [(x, y) for x, y in zip(numbers, given, strict=True) if not absent(y)]
    gaps = [high - low for (low, before), (high, after) in pairwise(there) if before != after]
    return min(gaps, default=math.inf) / 5
