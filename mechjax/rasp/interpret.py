"""What does a RASP program give for these tokens? The definition that compiled models are held to.

Plain Python over lists. A mean is taken exactly and then rounded once, so that it does not hang on the order of sums.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence
from fractions import Fraction
from typing import Any

from mechjax.base.errors import ArgumentError
from mechjax.rasp.expressions import (
    NOTHING,
    Aggregate,
    Expression,
    Indices,
    LinearSequenceMap,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    SOp,
    Tokens,
    ordered,
)

Selected = list[list[int]]
"""For each position, the positions that it selects."""


def interpret(program: SOp, inputs: Sequence[Hashable], *, causal: bool = False) -> list[Any]:
    """The value of `program` at every position of `inputs`. Costs `length**2` calls of each predicate.

    Args:
        program: A sequence.
        inputs: The tokens.
        causal: Whether a position selects only positions up to itself.

    Raises:
        ArgumentError: The program is no sequence, a function of it raises on a value that it meets, a mean is asked of
            what is no number, selected positions hold different categories, or none is selected and there is no
            default. The message names the expression.
    """
    check_sequence(program)
    return evaluate(program, inputs, causal=causal)[id(program)]


def evaluate(program: SOp, inputs: Sequence[Hashable], *, causal: bool) -> dict[int, Any]:
    """What every expression that `program` is made of gives, by identity; errors as in `interpret`."""
    found: dict[int, Any] = {}
    for node in ordered(program):
        read = [found[id(operand)] for operand in node.operands]
        found[id(node)] = _RULES[type(node)](node, read, inputs, causal)
    return found


def check_sequence(program: Any) -> None:
    """Refuse what is no sequence."""
    if not isinstance(program, SOp):
        what = f"the selector `{program.label}`" if isinstance(program, Select) else repr(program)
        raise ArgumentError(
            f"A program is a sequence (SOp), got {what}. Aggregate or SelectorWidth make a sequence of a selector."
        )


def mean(values: Iterable[Any]) -> float:
    """The mean of numbers, rounded once.

    Raises:
        TypeError: Something that is no finite number.
    """
    try:
        held = [value + 0 for value in values]  # text would be read as a number
        exact = held if all(isinstance(value, int) for value in held) else map(Fraction, held)
        return float(sum(exact) / len(held))
    except (ValueError, OverflowError) as error:
        raise TypeError(str(error)) from error


def weighted(node: LinearSequenceMap, first: Any, second: Any) -> float:
    """One value of a linear map."""
    return float(node.weight_first * first + node.weight_second * second)


def called(node: Expression, fn: Callable[..., Any], *args: Any) -> Any:
    """`fn(*args)`, whose errors say whose function it was.

    Raises:
        ArgumentError: It raised.
    """
    try:
        return fn(*args)
    except Exception as error:
        raise ArgumentError(
            f"The function of `{node.label}` ({type(node).__name__}) raised {type(error).__name__} on "
            f"{', '.join(map(repr, args))}: {error}. It has to give a value for everything that the program feeds it."
        ) from error


def _selected(node: Any, read: list[Any], inputs: Sequence[Any], causal: bool) -> Selected:
    keys, queries = read
    return [
        [
            k
            for k, key in enumerate(keys)
            if (k <= q or not causal) and called(node, node.predicate, key, query)
        ]
        for q, query in enumerate(queries)
    ]


def _aggregated(node: Any, read: list[Any], inputs: Sequence[Any], causal: bool) -> list[Any]:
    selected, values = read
    return [_aggregate(node, [values[k] for k in row], inputs, q) for q, row in enumerate(selected)]


def _aggregate(node: Aggregate, held: list[Any], inputs: Sequence[Any], q: int) -> Any:
    if not held:
        if node.default is NOTHING:
            raise ArgumentError(
                f"`{node.label}` (Aggregate) selects nothing at position {q} of {list(inputs)} and has no default: "
                "give `default=`, or a selector that always selects something."
            )
        return node.default
    if node.numerical:
        return called(node, mean, held)
    if different := [value for value in held if value != held[0]]:
        raise ArgumentError(
            f"`{node.label}` (Aggregate) selects different categories, {held[0]!r} and {different[0]!r}, at position "
            f"{q} of {list(inputs)}: categories have no mean. Select one position, or encode the values as numbers "
            '(encoding="numerical").'
        )
    return held[0]


_RULES: dict[type, Callable[[Any, list[Any], Sequence[Any], bool], Any]] = {
    Tokens: lambda node, read, inputs, causal: list(inputs),
    Indices: lambda node, read, inputs, causal: list(range(len(inputs))),
    Map: lambda node, read, inputs, causal: [called(node, node.fn, x) for x in read[0]],
    SequenceMap: lambda node, read, inputs, causal: [
        called(node, node.fn, *pair) for pair in zip(*read, strict=True)
    ],
    LinearSequenceMap: lambda node, read, inputs, causal: [
        called(node, lambda x, y: weighted(node, x, y), *pair) for pair in zip(*read, strict=True)
    ],
    Select: _selected,
    Aggregate: _aggregated,
    SelectorWidth: lambda node, read, inputs, causal: [len(row) for row in read[0]],
}
