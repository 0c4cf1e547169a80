"""The prompts of a store as a stream in which a place can be found again, and in which others are noticed.

A place is a number of batches with the checksum of all that came before. A stream that can say where it is (`state()`
and `restore(state)`, as `mechjax.text.pack` gives) goes there itself; any other is read from its start, without running
the model.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from mechjax.base.digests import tree_digest
from mechjax.base.errors import ArgumentError
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.store.calls import Batch, Reader, Source, batch_of


@dataclass(frozen=True)
class Position:
    """A place in the prompts.

    Attributes:
        batches: How many batches are through.
        rows: How many rows of the next one are.
        digest: A checksum of the batches that are through.
        following: That of the next one, where some of its rows are through.
        state: What the stream says of the place before the next one.
    """

    batches: int
    rows: int
    digest: str
    following: str | None
    state: Any


Placed = tuple[Batch, Position, Position]
"""A batch, with the places before and behind it."""


def start_of(prompts: Any) -> Position:
    """Where prompts are before any is taken."""
    return Position(0, 0, "", None, _state(prompts))


def batches_from(
    model: Reader, prompts: Iterable[Any], start: Position, *, skip_first: bool
) -> Iterator[Placed]:
    """The batches from a place on, the one that is partly through first.

    Args:
        model: What is run.
        prompts: Batches of prompts, from their start.
        start: The place.
        skip_first: Whether the first real token of each text is left out.

    Raises:
        ArgumentError: The prompts are not those of the place, or fewer.
        TokenError, ShapeError: Prompts that the model cannot take.
    """
    stream = _stream_at(model, (prompts,) if isinstance(prompts, Prompts) else prompts, start)
    done, digest, state = start.batches, start.digest, start.state
    for some in stream:
        batch = batch_of(model, some, skip_first=skip_first)
        own = _digest(batch)
        if done == start.batches and start.following not in (None, own):
            raise _others(f"in batch {done + 1}")
        before = Position(done, 0, digest, own, state)
        done, digest, state = done + 1, _chained(digest, own), _state(prompts)
        yield batch, before, Position(done, 0, digest, None, state)


def _stream_at(model: Reader, prompts: Iterable[Any], start: Position) -> Iterator[Any]:
    """The stream at a place."""
    if start.state is not None and isinstance(prompts, Source):
        prompts.restore(start.state)
        return iter(prompts)
    stream, digest = iter(prompts), ""
    for done in range(start.batches):
        some = next(stream, None)
        if some is None:
            raise ArgumentError(
                f"the prompts end after {done} batches, and {start.batches} are in the store. Give those that it was "
                "begun with, from their start."
            )
        digest = _chained(digest, _digest(batch_of(model, some, skip_first=False)))
    if digest != start.digest:
        raise _others(f"within the first {start.batches} batches")
    return stream


def _others(where: str) -> ArgumentError:
    return ArgumentError(
        f"these prompts are not those that the store was begun with: they differ {where}. Give the same, in the same "
        "batches and from their start, or choose another folder."
    )


def _state(prompts: Any) -> Any:
    """What the stream says of its place."""
    if not isinstance(prompts, Source):
        return None
    try:
        return json.loads(json.dumps(prompts.state(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArgumentError(
            f"`state()` of the prompts gives what is no JSON ({error}), so that the place cannot be kept."
        ) from None


def _digest(batch: Batch) -> str:
    """A checksum of a batch: its tokens, without what padding holds, which of them are real, and their positions.

    Of images their pixels; of what another function is called on, all of it.
    """
    if batch.examples is None:
        return tree_digest(batch.given)
    (ids,), mask, positions = batch.given.args, *map(batch.given.kwargs.get, ("mask", "positions"))
    total = hashlib.sha256(f"{ids.shape}".encode())
    pixels = jnp.issubdtype(ids.dtype, jnp.floating)
    total.update(whole(ids, np.float32 if pixels else np.int32).tobytes())
    if mask is not None and not whole(mask).all():
        total.update(b"mask" + whole(mask).tobytes())
    if positions is not None:
        total.update(b"positions" + whole(positions, np.int32).tobytes())
    return total.hexdigest()


def _chained(before: str, own: str) -> str:
    return hashlib.sha256(f"{before} {own}".encode()).hexdigest()
