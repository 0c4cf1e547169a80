"""Which values can each sequence of a program take? Sets, from the bottom up, that hold all of them and perhaps more.

A value for which a function raises is left out: where it were met, the interpreter would refuse the program. The sets
of numerical sequences are found only for those that a `Map` reads, which has to tell their values apart.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import product
from typing import Any

from mechjax.base.errors import ArgumentError
from mechjax.rasp.expressions import (
    NOTHING,
    Aggregate,
    Expression,
    Indices,
    LinearSequenceMap,
    Map,
    SelectorWidth,
    SequenceMap,
    SOp,
    Tokens,
)
from mechjax.rasp.interpret import mean, weighted

MOST = 4096
"""A sequence that could take more values, or a map of more pairs of them, is refused."""

_ABSENT: Any = object()


class Values:
    """The values that sequences can take on inputs over `vocabulary` of at most `max_length` tokens."""

    def __init__(self, vocabulary: Sequence[Hashable], max_length: int) -> None:
        self.vocabulary, self.max_length = tuple(vocabulary), max_length
        self._found: dict[int, tuple[Any, ...]] = {}

    def of(self, node: SOp) -> tuple[Any, ...]:
        """Its values: numbers in order, categories in the order in which they are found.

        Raises:
            ArgumentError: None, too many, or some that are no numbers where numbers are meant.
        """
        if id(node) not in self._found:
            found = tuple(dict.fromkeys(self._checked(node, self._RULES[type(node)](self, node))))
            if not found:
                raise ArgumentError(
                    f"`{node.label}` ({type(node).__name__}) cannot be compiled: its function raises for every value "
                    "that it could be given, so it has none of its own."
                )
            self._found[id(node)] = tuple(sorted(found)) if node.numerical else found
        return self._found[id(node)]

    def _checked(self, node: SOp, values: Iterable[Any]) -> Iterable[Any]:
        seen = set[Any]()
        for value in values:
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if node.numerical and not number:
                raise ArgumentError(
                    f"`{node.label}` ({type(node).__name__}) cannot be compiled: it is numerical, and could be "
                    f'{value!r}, which is no number. Let it give numbers, or leave out encoding="numerical".'
                )
            seen.add(_hashed(node, value))
            _at_most(node, len(seen))
            yield value

    def _means(self, node: Aggregate) -> Iterable[float]:
        """Every mean of at most `max_length` of the values."""
        own, default = self.of(node.values), () if node.default is NOTHING else (node.default,)
        if not node.numerical:
            yield from (*own, *default)
            return
        yield from default
        sums: set[tuple[Any, ...]] = {()}
        for _ in range(self.max_length):
            # Multisets as sorted tuples: sums of floats would hang on their order.
            sums = {tuple(sorted((*held, value))) for held in sums for value in own}
            _at_most(node, len(sums))
            yield from map(mean, sums)

    _RULES: dict[type, Callable[["Values", Any], Iterable[Any]]] = {  # noqa: RUF012  a table, never changed
        Tokens: lambda self, node: self.vocabulary,
        Indices: lambda self, node: range(self.max_length),
        Map: lambda self, node: _given(node.fn, ((x,) for x in self.of(node.of))),
        SequenceMap: lambda self, node: _given(
            node.fn, _pairs(node, self.of(node.first), self.of(node.second))
        ),
        LinearSequenceMap: lambda self, node: (
            weighted(node, *pair) for pair in _pairs(node, self.of(node.first), self.of(node.second))
        ),
        Aggregate: _means,
        SelectorWidth: lambda self, node: range(self.max_length + 1),
    }


def given(fn: Callable[..., Any], *args: Any) -> Any:
    """What `fn` gives, or `absent` where it raises."""
    try:
        return fn(*args)
    except Exception:  # whatever a user's function raises for values that it never meets
        return _ABSENT


def absent(value: Any) -> bool:
    """Whether `given` found that the function raises."""
    return value is _ABSENT


def _given(fn: Callable[..., Any], args: Iterable[tuple[Any, ...]]) -> Iterable[Any]:
    return (value for value in (given(fn, *each) for each in args) if not absent(value))


def _pairs(node: Expression, first: tuple[Any, ...], second: tuple[Any, ...]) -> Iterable[tuple[Any, Any]]:
    _at_most(node, len(first) * len(second))
    return product(first, second)


def _at_most(node: Expression, number: int) -> None:
    if number > MOST:
        raise ArgumentError(
            f"`{node.label}` ({type(node).__name__}) cannot be compiled: it could take more than {MOST:,} values, each "
            "of which needs a neuron. Map its operands to fewer values, or compile for shorter inputs."
        )


def _hashed(node: Expression, value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        raise ArgumentError(
            f"`{node.label}` ({type(node).__name__}) cannot be compiled: it could be {value!r}, which does not hash. "
            "Values are numbers, text, None and tuples of them."
        ) from None
    return value
