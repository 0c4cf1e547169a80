"""What crosses between devices in a compiled program: its collectives, once and in loops, read from XLA's text."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping

import equinox as eqx

from mechjax.base.records import Record

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
_BITS = {"pred": 8, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
_OPERATION = re.compile(r"= (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z][a-z-]*)\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<shape>[\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=\d+")
_CALLED = re.compile(
    r"(?P<how>body|condition|calls|to_apply|\w+_computations?)=(?P<names>\{[^}]*\}|%?[\w.-]+)"
)


class Collectives(Record):
    """The collectives of a compiled program, by how many loops stand around them. All fields are static.

    Attributes:
        counts: For no loop around, one, two and so on: how many of each kind the text has.
        bytes: For the same, bytes of what one device holds of their results, each run once.
        largest: For the same, of the largest result.
    """

    counts: tuple[Mapping[str, int], ...] = eqx.field(static=True)
    bytes: tuple[int, ...] = eqx.field(static=True)
    largest: tuple[int, ...] = eqx.field(static=True)

    @property
    def inner(self) -> Mapping[str, int]:
        """Those of the innermost loops that have any: of a scan over layers those of one layer."""
        return next((counts for counts in self.counts[:0:-1] if counts), {})


def collectives(text: str) -> Collectives:
    """Count the collectives of a program from `compiled.as_text()`.

    A pair of start and done counts once, as does one collective of several arrays, or one that is done in pieces.
    Loops that the compiler unrolled are no loops any more.

    Args:
        text: XLA's text of a compiled program, all computations included.
    """
    entry, bodies = _computations(text)
    found: dict[int, list[tuple[str, int]]] = {}
    seen = set()  # a collective that is done piece by piece stands in the text many times, with one channel
    for depth, line in _walk(entry, bodies, 0):
        operation, channel = _OPERATION.search(line), _CHANNEL.search(line)
        kind = operation["kind"].removesuffix("-start") if operation else ""
        if operation is None or kind not in KINDS or (channel and channel.group() in seen):
            continue
        seen.update({channel.group()} if channel else ())
        found.setdefault(depth, []).append((kind, _result_bytes(operation)))
    levels = [found.get(depth, []) for depth in range(max(found, default=0) + 1)]
    return Collectives(
        tuple(dict(Counter(kind for kind, _ in level)) for level in levels),
        tuple(sum(size for _, size in level) for level in levels),
        tuple(max((size for _, size in level), default=0) for level in levels),
    )


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """The entry's name, and the lines of each computation."""
    entry, bodies, lines = "", {}, []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = bodies.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif line.startswith("  "):
            lines.append(line)
    return entry, bodies


def _walk(name: str, bodies: Mapping[str, list[str]], depth: int) -> Iterator[tuple[int, str]]:
    """Every operation that a computation runs, and how many loops stand around it."""
    for line in bodies.get(name, ()):
        yield depth, line
        for called in _CALLED.finditer(line.partition(", metadata=")[0]):
            for inner in called["names"].strip("{}").split(","):
                deeper = depth + (called["how"] in ("body", "condition"))
                yield from _walk(inner.strip().lstrip("%"), bodies, deeper)


def _result_bytes(operation: re.Match[str]) -> int:
    """Of a start, which gives operands and results, the larger half."""
    sizes = [
        math.prod(int(n) for n in found["shape"].split(",") if n) * _bits(found["dtype"]) // 8
        for found in _ARRAY.finditer(re.sub(r"\{[^}]*\}", "", operation["shape"]))
    ]
    return max(sizes, default=0) if operation["kind"].endswith("-start") else sum(sizes)


def _bits(dtype: str) -> int:
    number = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(number.group()) if number else 0)
