"""Batches read from disk, whose place can be saved."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.store.arrays import Columns
from mechjax.store.order import Order
from mechjax.store.rows import NUMPY

Rows = Float[np.ndarray, "row *layer width"]
Targets = Float[np.ndarray, "row *target_layer target_width"]
Side = tuple[tuple[int, ...], bool]
"""Columns, and whether they are given side by side."""


@dataclass(frozen=True)
class Reading:
    """What decides which row comes where.

    Attributes:
        order: Of the rows.
        batch: Rows of a batch.
        epochs: How often to go through them; None without end.
        sides: What is given: one entry for arrays, two for pairs.
        dtype: What it is given as.
    """

    order: Order
    batch: int
    epochs: int | None
    sides: tuple[Side, ...]
    dtype: str

    @property
    def steps(self) -> int | None:
        """How many batches there are; None without end."""
        return None if self.epochs is None else self.epochs * self.order.rows // self.batch


class Batches:
    """An iterator over batches of rows. Made by `Store.batches`.

    While one buffer is given, the next is read in the background.
    """

    def __init__(self, columns: Columns, reading: Reading) -> None:
        self._columns, self._reading = columns, reading
        self._go_to(0)

    @property
    def steps(self) -> int | None:
        """How many batches there are in all; None without end."""
        return self._reading.steps

    @property
    def step(self) -> int:
        """How many batches were given: `at(step)` of the same store, key and settings goes on from here."""
        return self._step

    @property
    def digest(self) -> str:
        """The store's checksum."""
        return self._columns.manifest.digest

    def state(self) -> dict[str, np.ndarray]:
        """The place behind the last batch given, and what it means nothing without, as arrays."""
        return {"step": np.asarray(self._step, np.int32), **self._identity()}

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go to the place of `state`: the next batch is the one that came next there, to the bit.

        Raises:
            ArgumentError: The state is of another store, or of other settings.
        """
        mine = self._identity()
        if missing := sorted(("step", *mine) - state.keys()):
            raise ArgumentError(f"resume takes what `state()` gave; this has no {', '.join(missing)}.")
        differs = [name for name, x in mine.items() if not np.array_equal(x, state[name])]
        if differs:
            told = ", ".join(
                f"{name} {_told(name, state[name])} (now {_told(name, mine[name])})" for name in differs
            )
            raise ArgumentError(
                f"this place is one in other batches: {told}. Read the same store with the same settings."
            )
        self.at(int(state["step"]))

    def at(self, step: int) -> "Batches":
        """Go to a step: the next batch is the one that comes after so many.

        Raises:
            ArgumentError: No such step.
        """
        if step < 0 or (self.steps is not None and step > self.steps):
            raise ArgumentError(f"step {step}: there are 0 to {self.steps}.")
        self._go_to(step)
        return self

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Rows | tuple[Rows, Targets]:
        if self._step == self.steps:
            raise StopIteration
        try:
            parts = list(self._parts(self._reading.batch))
        except BaseException:
            self._go_to(self._step)  # a batch is given whole or not at all
            raise
        self._step += 1
        given = [
            np.concatenate(side).astype(NUMPY[self._reading.dtype], copy=False)
            for side in zip(*parts, strict=True)
        ]
        return (given[0], given[1]) if len(given) == 2 else given[0]

    def _parts(self, wanted: int) -> Iterator[list[np.ndarray]]:
        """The next rows, each side of a pair by itself, from one buffer or from several."""
        while wanted:
            if self._through == len(self._held[0]):
                self._held, self._through = next(self._buffers), 0
            part = [side[self._through : self._through + wanted] for side in self._held]
            self._through += len(part[0])
            wanted -= len(part[0])
            yield part

    def _go_to(self, step: int) -> None:
        self._step, self._through = step, 0
        self._held: list[np.ndarray] = [np.empty(0)]
        self._buffers = self._read(step * self._reading.batch)

    def _read(self, start: int) -> Iterator[list[np.ndarray]]:
        """Buffers of rows; the next one is asked for before one is given."""
        needed = {column for columns, _ in self._reading.sides for column in columns}
        given = None
        for rows in self._reading.order.windows(start, self._reading.epochs):
            asked = {column: self._columns.asked(column, rows) for column in needed}
            if given is not None:
                yield given
            given = self._given(rows, asked)
        if given is not None:
            yield given

    def _given(self, rows: Int[np.ndarray, "row"], asked: dict[int, Any]) -> list[np.ndarray]:
        """What was asked for, each side of a pair by itself."""
        found = {column: self._columns.given(one, column, rows) for column, one in asked.items()}
        return [
            np.stack([found[i] for i in columns], 1) if stacked else found[columns[0]]
            for columns, stacked in self._reading.sides
        ]

    def _identity(self) -> dict[str, np.ndarray]:
        """What a place means nothing without. Numbers are those that any checkpoint can hold."""
        reading, order = self._reading, self._reading.order
        columns = [column for side, _ in reading.sides for column in side]
        sides = [number for side, stacked in reading.sides for number in (len(side), stacked)]
        return {
            "store": np.frombuffer(bytes.fromhex(self._columns.manifest.digest), np.uint8),
            "batch": np.asarray(reading.batch, np.int32),
            "buffer": np.asarray(order.chunk * order.chunks, np.int32),
            "shuffled": np.asarray(order.seed is not None),
            "key": np.array(order.seed or (0,), np.uint32),
            "columns": np.array(columns, np.int32),
            "sides": np.array(sides, np.int32),
            "dtype": np.asarray(list(NUMPY).index(reading.dtype), np.int32),
        }


def _told(name: str, value: np.ndarray) -> str:
    """A value of a state in few words."""
    if name == "dtype" and 0 <= int(value) < len(NUMPY):
        return list(NUMPY)[int(value)]
    return bytes(value).hex()[:12] if name == "store" else str(np.asarray(value).tolist())
