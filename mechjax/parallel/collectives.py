"""What crosses between devices in a compiled program: its collectives, once and in loops, read from XLA's text."""

import re
from collections import Counter
from collections.abc import Mapping

import equinox as eqx

from mechjax.base.records import Record
from mechjax.parallel.operations import Operation, operations

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip
_CHANNEL = re.compile(r"channel_id=\d+")


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
    found: dict[int, list[tuple[str, int]]] = {}
    seen = set()  # a collective that is done piece by piece stands in the text many times, with one channel
    for operation in operations(text):
        kind, channel = operation.kind.removesuffix("-start"), _CHANNEL.search(operation.line)
        if kind not in KINDS or (channel and channel.group() in seen):
            continue
        seen.update({channel.group()} if channel else ())
        found.setdefault(operation.depth, []).append((kind, _result_bytes(operation)))
    levels = [found.get(depth, []) for depth in range(max(found, default=0) + 1)]
    return Collectives(
        tuple(dict(Counter(kind for kind, _ in level)) for level in levels),
        tuple(sum(size for _, size in level) for level in levels),
        tuple(max((size for _, size in level), default=0) for level in levels),
    )


def _result_bytes(operation: Operation) -> int:
    """Of a start, which gives operands and results, the larger half."""
    sizes = [array.bytes for array in operation.results]
    return max(sizes, default=0) if operation.kind.endswith("-start") else sum(sizes)
