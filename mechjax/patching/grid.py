"""The cells of a sweep, and how they are cut: into buckets that run from one position on, and units of a few cells.

All of it follows from a few numbers, so whoever has these (a folder's `sweep.json` holds them) knows every unit.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Unit:
    """Cells that run at once.

    Attributes:
        index: Its number, from 0.
        layer: The layer that they edit; None for all.
        start: The first position that runs.
        cells: Which of the layer's cells.
        size: With how many cells it runs; the last of a group is filled up with repeats.
    """

    index: int
    layer: int | None
    start: int
    cells: Int[np.ndarray, " cell"]
    size: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"unit-{self.index:06d}.safetensors"


@dataclass(frozen=True)
class Grid:
    """Cells.

    Attributes:
        layers: How many layers are swept; None where all are patched at once.
        over: The axes that are swept.
        sizes: Their lengths, without the layer's.
        starts: For each swept position the first that runs; empty where all positions run.
        chunk: Cells that run at once.
        n_pos: Positions of a prompt.
    """

    layers: int | None
    over: tuple[str, ...]
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    chunk: int
    n_pos: int

    @property
    def swept(self) -> tuple[str, ...]:
        """The axes without the layer."""
        return tuple(axis for axis in self.over if axis != "layer")

    def cells(self) -> Int[np.ndarray, "cell axis"]:
        """The place of every cell of a layer; one of no indices where no axis is swept."""
        return np.indices(self.sizes).reshape(len(self.sizes), math.prod(self.sizes)).T

    def buckets(self) -> Iterator[tuple[int, Int[np.ndarray, " cell"]]]:
        """The first position that runs, and which cells are in its bucket."""
        cells = self.cells()
        if not self.starts:
            yield 0, np.arange(len(cells))
            return
        first = np.array(self.starts)[cells[:, self.swept.index("pos")]]
        for start in np.unique(first):
            yield int(start), np.flatnonzero(first == start)

    def size_of(self, start: int) -> int:
        """Cells that run at once from a position on: shorter runs leave room for more."""
        return max(1, self.chunk * self.n_pos // (self.n_pos - start))

    def units(self) -> list[Unit]:
        """All units, in order."""

        def parts() -> Iterator[tuple[int | None, int, np.ndarray, int]]:
            for layer in (None,) if self.layers is None else range(self.layers):
                for start, cells in self.buckets():
                    size = even(len(cells), self.size_of(start))[1]
                    yield from ((layer, start, cells[i : i + size], size) for i in range(0, len(cells), size))

        return [Unit(i, *part) for i, part in enumerate(parts())]


def even(n: int, most: int) -> tuple[int, int]:
    """Number and size of chunks of `n` cells, of at most `most`, that are as alike as can be."""
    chunks = -(-n // most)
    return chunks, -(-n // chunks)
