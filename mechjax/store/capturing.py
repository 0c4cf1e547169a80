"""Rows of prompts, gathered until they fill a shard."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.inputs import Inputs
from mechjax.base.whole import whole
from mechjax.store.calls import Batch, Reader, filled
from mechjax.store.manifest import Specification
from mechjax.store.rows import NUMPY, Column, captured
from mechjax.store.source import Placed, Position, batches_from

Rows = tuple[Float[np.ndarray, "_ _"], ...]


@dataclass(frozen=True)
class Filled:
    """Rows of a shard.

    Attributes:
        columns: The rows of each column.
        skipped: How many were left out among them as not finite.
        end: The place in the prompts behind the last one.
        last: Whether none follow.
    """

    columns: Rows
    skipped: int
    end: Position
    last: bool


@dataclass(frozen=True)
class _Run:
    """What one batch of prompts gave: rows of every token, and which of them are stored."""

    rows: Rows
    kept: Int[np.ndarray, "row"]
    skipped: int
    before: Position
    after: Position


class _Gathering:
    """Memory for a shard, and how full it is."""

    def __init__(self, said: Specification, most: int) -> None:
        self.most, self.held, self.skipped = most, 0, 0
        self._columns = [np.empty((most, x.width), NUMPY[said.dtype]) for x in said.columns]

    def take(self, rows: Rows, which: Int[np.ndarray, "row"]) -> int:
        """Copy as many rows as there is room for."""
        which = which[: self.most - self.held]
        for column, source in zip(self._columns, rows, strict=True):
            column[self.held : self.held + len(which)] = source[which]
        self.held += len(which)
        return len(which)

    def given(self, end: Position, *, last: bool) -> Filled:
        """What was gathered."""
        return Filled(tuple(x[: self.held] for x in self._columns), self.skipped, end, last)


def shards_from(
    model: Reader,
    prompts: Iterable[Any],
    said: Specification,
    start: Position,
    rows: int | None,
) -> Iterator[Filled]:
    """The shards from a place in the prompts on. The last one has `last`, and may be empty.

    Args:
        model: What is run.
        prompts: Batches of prompts, from their start.
        said: What is stored.
        start: The place.
        rows: How many rows there are to be; None for all.

    Raises:
        ArgumentError: Rows that are not finite, where that stops it, or prompts that are not those of the place.
        TokenError, ShapeError: Prompts that the model cannot take.
    """
    end, left = start, rows
    shard = _Gathering(said, said.shard_rows if left is None else min(left, said.shard_rows))
    for run in _runs(model, batches_from(model, prompts, start, skip_first=said.skip_first), said):
        done = start.rows if run.before.batches == start.batches else 0
        while True:
            done += shard.take(run.rows, run.kept[done:])
            through = done == len(run.kept)
            shard.skipped += run.skipped if through else 0
            end = run.after if through else replace(run.before, rows=done)
            if shard.held == shard.most:
                left = None if left is None else left - shard.held
                yield shard.given(end, last=left == 0)
                if left == 0:
                    return
                shard = _Gathering(said, said.shard_rows if left is None else min(left, said.shard_rows))
            if through:
                break
    yield shard.given(end, last=True)


def _runs(model: Reader, batches: Iterator[Placed], said: Specification) -> Iterator[_Run]:
    """What each batch gives; the next is being computed while one is looked at."""
    waiting, examples = None, None
    for placed in batches:
        batch = placed[0]
        examples = batch.examples if examples is None else examples
        batch = filled(batch, examples)
        arrays = _captured(model, batch.given, said.columns, said.dtype)
        if waiting is not None:
            yield _looked_at(*waiting, said)
        waiting = (batch, arrays, *placed[1:])
    if waiting is not None:
        yield _looked_at(*waiting, said)


@eqx.filter_jit
def _captured(
    model: Reader, given: Inputs, columns: tuple[Column, ...], dtype: str
) -> tuple[tuple[Array, ...], Bool[Array, "column token"], tuple[int, ...]]:
    """Rows, which of them are finite, and how many there are along each of the axes that they are of."""
    rows, places = captured(model, given, columns, dtype)
    return rows, jnp.stack([jnp.isfinite(x).all(-1) for x in rows]), places


def _looked_at(batch: Batch, arrays: Any, before: Position, after: Position, said: Specification) -> _Run:
    """Rows on the host, and which of them are finite.

    Raises:
        ArgumentError: One is not, where that stops it.
    """
    real, places = batch.real(arrays[2]), arrays[2]
    fine = whole(arrays[1])
    every = fine.all(0)
    wrong = np.flatnonzero(real & ~every)
    if len(wrong) and said.not_finite == "abort":
        example, *pos = (int(i) for i in np.unravel_index(wrong[0], places))
        at = f", position {', '.join(map(str, pos))}" if pos else ""
        column = said.columns[int(np.argmin(fine[:, wrong[0]]))]
        far = " float16 ends at 65504: bfloat16 and float32 reach further." if said.dtype == "float16" else ""
        raise ArgumentError(
            f"{column} is not finite as {said.dtype} in batch {before.batches + 1} of the prompts, example "
            f"{example}{at}.{far} The shards before are whole. Look at that prompt; to leave such tokens out and "
            "count them, begin in another folder with not_finite='skip'."
        )
    return _Run(tuple(map(whole, arrays[0])), np.flatnonzero(real & every), len(wrong), before, after)
