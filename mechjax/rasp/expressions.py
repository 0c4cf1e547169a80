"""RASP's expressions: sequences of values, one per position, and selectors, one truth value per pair of positions.

Weiss et al. 2021, "Thinking like transformers", arXiv:2106.06981. Every expression is a node of a graph; what two
others share is one node, told apart by identity. `interpret` runs it, `compile_program` makes a transformer of it.

    opposite = SequenceMap(lambda n, i: n - i - 1, length(), indices)
    reverse = Aggregate(Select(indices, opposite, lambda key, query: key == query), tokens)

A sequence is *categorical* (each value has a direction of the residual stream to itself) or *numerical* (one direction,
as long as the value). Selectors and maps of two sequences read categorical ones; means and sums need numerical ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from mechjax.base.errors import ArgumentError

Encoding = Literal["categorical", "numerical"]
NOTHING: Any = type("Nothing", (), {"__repr__": lambda self: "no default"})()
"""Stands for a default that was not given: None is a value as any other."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Expression:
    """A node; `name` is what messages and the compiled model's variables call it."""

    name: str | None = None

    def __post_init__(self) -> None:
        for what, wanted in type(self)._OPERANDS.items():
            value = getattr(self, what)
            if not isinstance(value, wanted):
                raise ArgumentError(
                    f"{type(self).__name__} takes {_A[wanted]} as `{what}`, got {_told(value)}. {_HINTS[wanted]}"
                )

    _OPERANDS = {}  # noqa: RUF012  by class, not by instance

    @property
    def operands(self) -> tuple["Expression", ...]:
        """The expressions that it reads."""
        return tuple(getattr(self, what) for what in type(self)._OPERANDS)

    @property
    def label(self) -> str:
        """Its name, or else what it is made of."""
        if self.name is not None:
            return self.name
        return f"{type(self).__name__}({', '.join(x.name or type(x).__name__ for x in self.operands)})"


@dataclass(frozen=True, eq=False, kw_only=True)
class SOp(Expression):
    """A sequence: one value for each position."""

    encoding: Encoding = "categorical"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoding not in ("categorical", "numerical"):
            raise ArgumentError(
                f"`encoding` = {self.encoding!r} of `{self.label}` is not one of 'categorical', 'numerical'."
            )

    @property
    def numerical(self) -> bool:
        """Whether it is one number along one direction."""
        return self.encoding == "numerical"


@dataclass(frozen=True, eq=False)
class Tokens(SOp):
    """The input itself: `tokens` is the one instance needed."""


@dataclass(frozen=True, eq=False)
class Indices(SOp):
    """Each position's index from 0: `indices` is the one instance needed."""


@dataclass(frozen=True, eq=False)
class Map(SOp):
    """`fn` of each value; also turns numbers into categories and back (`encoding=`)."""

    fn: Callable[[Any], Any]
    of: SOp

    _OPERANDS = {"of": SOp}  # noqa: RUF012


@dataclass(frozen=True, eq=False)
class SequenceMap(SOp):
    """`fn` of each pair of values of two categorical sequences."""

    fn: Callable[[Any, Any], Any]
    first: SOp
    second: SOp

    _OPERANDS = {"first": SOp, "second": SOp}  # noqa: RUF012


@dataclass(frozen=True, eq=False)
class LinearSequenceMap(SOp):
    """`weight_first * first + weight_second * second` of two numerical sequences."""

    first: SOp
    second: SOp
    weight_first: float
    weight_second: float
    encoding: Encoding = field(default="numerical", kw_only=True)

    _OPERANDS = {"first": SOp, "second": SOp}  # noqa: RUF012


@dataclass(frozen=True, eq=False)
class Select(Expression):
    """Which positions each position looks at: those for which `predicate(key, query)` holds."""

    keys: SOp
    queries: SOp
    predicate: Callable[[Any, Any], Any]

    _OPERANDS = {"keys": SOp, "queries": SOp}  # noqa: RUF012

    def __and__(self, other: "Select") -> "Select":
        """What both select. Of different sequences it compares their pairs: as many values as both have, multiplied."""
        return _joined(self, other, all)

    def __or__(self, other: "Select") -> "Select":
        """What either selects; cost as for `&`."""
        return _joined(self, other, any)

    def __invert__(self) -> "Select":
        """What it does not select."""
        return Select(self.keys, self.queries, lambda key, query: not self.predicate(key, query))


@dataclass(frozen=True, eq=False)
class Aggregate(SOp):
    """What the selected positions hold: of categories, the one that they share; of numbers, their mean.

    Encoded as `values` is. Where nothing is selected it is `default`; without one, something always must be.
    """

    selector: Select
    values: SOp
    default: Any = NOTHING

    _OPERANDS = {"selector": Select, "values": SOp}  # noqa: RUF012

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "encoding", self.values.encoding)
        if self.numerical and self.default is not NOTHING and not isinstance(self.default, int | float):
            raise ArgumentError(
                f"`default` = {self.default!r} of `{self.label}` must be a number, as the mean of "
                f"`{self.values.label}` is."
            )


@dataclass(frozen=True, eq=False)
class SelectorWidth(SOp):
    """How many positions each position selects."""

    selector: Select

    _OPERANDS = {"selector": Select}  # noqa: RUF012


_A = {SOp: "a sequence", Select: "a selector"}
_HINTS = {
    SOp: "A selector becomes one by Aggregate or SelectorWidth; begin with `tokens` or `indices`.",
    Select: "Select(keys, queries, predicate) makes one of two sequences.",
}
tokens = Tokens(name="tokens")
indices = Indices(name="indices")


def always(key: Any, query: Any) -> bool:
    """The predicate that selects every position."""
    return True


def equal(key: Any, query: Any) -> bool:
    """The predicate that selects positions with the same value."""
    return key == query


def ordered(program: Expression) -> list[Expression]:
    """Every expression that `program` is made of, itself last, each after what it reads."""
    found: dict[int, Expression] = {}
    stack = [(program, False)]
    while stack:
        node, ready = stack.pop()
        if ready:
            found.setdefault(id(node), node)
        elif id(node) not in found:
            stack += [(node, True), *((operand, False) for operand in reversed(node.operands))]
    return list(found.values())


def _joined(first: Select, second: Select, fold: Callable[[Any], bool]) -> Select:
    if not isinstance(second, Select):
        raise ArgumentError(
            f"`{first.label}` (Select) combines with another selector by & and |, got {_told(second)}."
        )
    pairs = [(first.keys, second.keys), (first.queries, second.queries)]
    keys = _together(*pairs[0])
    queries = keys if pairs[0] == pairs[1] else _together(*pairs[1])
    both = lambda pair, value: (value, value) if pair[0] is pair[1] else value

    def predicate(key: Any, query: Any) -> bool:
        sides = zip((first, second), both(pairs[0], key), both(pairs[1], query), strict=True)
        return fold(one.predicate(k, q) for one, k, q in sides)

    return Select(keys, queries, predicate)


def _together(first: SOp, second: SOp) -> SOp:
    return first if first is second else SequenceMap(lambda x, y: (x, y), first, second)


def _told(value: Any) -> str:
    return f"`{value.label}` ({type(value).__name__})" if isinstance(value, Expression) else repr(value)
