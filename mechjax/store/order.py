"""In which order rows are given: every one once in an epoch, shuffled across shards with little memory.

Chunks of rows (what is read at once) are permuted over the whole store, so many of them are read as a window holds, and
the rows of a window are permuted. All of it follows from a key, the epoch and the window: a place is one number. The
bits are raw ones of PCG64, of which numpy promises that they stay the same, as it does not of `permutation`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Order:
    """An order of rows.

    Attributes:
        rows: How many there are.
        chunk: How many lie together.
        chunks: How many chunks a window has.
        seed: The words of a key; None for the order in which rows were written.
    """

    rows: int
    chunk: int
    chunks: int
    seed: tuple[int, ...] | None

    def windows(self, start: int, epochs: int | None) -> Iterator[Int[np.ndarray, "row"]]:
        """Rows of one window after another, from a place on.

        Args:
            start: How many rows are through, epochs together.
            epochs: After how many epochs it ends; None for never.
        """
        epoch, through = divmod(start, self.rows)
        while epochs is None or epoch < epochs:
            chunks = self._permuted(-(-self.rows // self.chunk), epoch, 0)
            sizes = np.full(len(chunks), self.chunk)
            sizes[chunks == len(chunks) - 1] -= (
                len(chunks) * self.chunk - self.rows
            )  # the last has fewer rows
            ends = np.cumsum(sizes)[self._lasts(len(chunks))]
            for number in range(int(np.searchsorted(ends, through, side="right")), len(ends)):
                before = int(ends[number - 1]) if number else 0
                yield self._window(chunks, epoch, number)[max(through - before, 0) :]
            epoch, through = epoch + 1, 0

    def _lasts(self, n: int) -> Int[np.ndarray, "window"]:
        """The last chunk of each window."""
        return np.minimum(np.arange(self.chunks, n + self.chunks, self.chunks), n) - 1

    def _window(self, chunks: np.ndarray, epoch: int, number: int) -> Int[np.ndarray, "row"]:
        own = chunks[number * self.chunks : (number + 1) * self.chunks]
        rows = (own[:, None] * self.chunk + np.arange(self.chunk)).reshape(-1)
        rows = rows[rows < self.rows]
        return rows[self._permuted(len(rows), epoch, number + 1)]

    def _permuted(self, n: int, *which: int) -> Int[np.ndarray, "n"]:
        if self.seed is None:
            return np.arange(n)
        bits = np.random.PCG64(np.random.SeedSequence([*self.seed, *which]))
        return np.argsort(bits.random_raw(n), kind="stable")
