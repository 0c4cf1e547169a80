"""The operations of a compiled program, read from XLA's text: how often each runs, what it takes and what it gives."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_OPERATION = re.compile(
    r"^\s+(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) (?P<kind>[a-z][\w-]*)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(
    r"(?P<how>body|condition|calls|to_apply|\w+_computations?)=(?P<names>\{[^}]*\}|%?[\w.-]+)"
)
_LENGTH = re.compile(r"known_trip_count\W+n\W+(\d+)")


class ArrayType(NamedTuple):
    """What an array of a program is.

    Attributes:
        dtype: As XLA spells it: "f32", "bf16", "pred".
        shape: Its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """How many it takes; none for tokens and what else holds no numbers."""
        number = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(number.group()) if number else 0)
        return math.prod(self.shape) * bits // 8


class Operation(NamedTuple):
    """An operation of a program.

    Attributes:
        times: How often it runs: the product of the lengths of the loops around it. One of unknown length counts once.
        depth: How many loops stand around it.
        kind: What it is, as XLA spells it: "dot", "all-reduce-start".
        results: What it gives: several arrays where it gives a tuple.
        operands: What each operand is, in the same way; nothing for what another computation made.
        line: All that the text says of it.
    """

    times: int
    depth: int
    kind: str
    results: tuple[ArrayType, ...]
    operands: tuple[tuple[ArrayType, ...], ...]
    line: str


def operations(text: str) -> Iterator[Operation]:
    """Every operation that a program runs, those of a computation once for each place that calls it.

    Loops that the compiler unrolled are no loops any more.

    Args:
        text: XLA's text of a compiled program (`compiled.as_text()`), all computations included.
    """
    entry, bodies = _computations(text)
    return _walk(entry, bodies, 1, 0)


def _computations(text: str) -> tuple[str, dict[str, list[re.Match[str]]]]:
    """The entry's name, and the operations of each computation."""
    entry, bodies, found = "", {}, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            found = bodies.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif operation := _OPERATION.match(line):
            found.append(operation)
    return entry, bodies


def _walk(
    name: str, bodies: Mapping[str, list[re.Match[str]]], times: int, depth: int
) -> Iterator[Operation]:
    results = {found["name"]: _arrays(found["result"]) for found in bodies.get(name, ())}
    for found in bodies.get(name, ()):
        said = found["rest"].partition(", metadata=")[0]
        given = re.findall(r"%([\w.-]+)", said.partition(")")[0])
        operands = tuple(results.get(operand, ()) for operand in given)
        yield Operation(times, depth, found["kind"], results[found["name"]], operands, found.group())
        length = _LENGTH.search(found["rest"])
        for called in _CALLED.finditer(said):
            looped = called["how"] in ("body", "condition")
            runs = times * int(length[1]) if looped and length else times
            for inner in called["names"].strip("{}").split(","):
                yield from _walk(inner.strip().lstrip("%"), bodies, runs, depth + looped)


def _arrays(said: str) -> tuple[ArrayType, ...]:
    """The arrays of a result; layouts between braces are none."""
    return tuple(
        ArrayType(found["dtype"], tuple(int(n) for n in found["shape"].split(",") if n))
        for found in _ARRAY.finditer(re.sub(r"\{[^}]*\}", "", said))
    )
