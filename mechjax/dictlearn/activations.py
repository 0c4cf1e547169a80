"""Activations of a model as a stream of shuffled batches, which dictionaries are trained on.

Tokens of one text lie side by side and are alike; a dictionary wants them apart. A buffer on the device holds many
rows, batches are drawn from all of it in random order, and the places of the half that was given take new rows: each
row is given exactly once. The stream can be written down and gone on with (`Shuffled.state`), to the bit.

Shapes are those of the buffer and of a batch of prompts, however many of its tokens are real: which rows go where is
data, so nothing is compiled after the first batches.

Cost: for each batch of prompts a forward of the model up to the site's layer, of another function all of it; memory of
`buffer` rows, twice while they are mixed.
Misleads when: the buffer is small beside the length of texts: rows of one text then meet in one batch.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.models.structures import Model
from mechjax.store.calls import batch_of, reading
from mechjax.store.identity import model_digests
from mechjax.store.rows import captured, column_of

Rows = Float[Array, "_ width"]
Some = tuple[Rows, Int[np.ndarray, " some"]]
"""Rows, and which of them are given."""


def activations(
    model: Model | Callable[..., Any],
    prompts: Iterable[Any],
    site: str,
    *,
    layer: int | None,
    batch: int,
    key: Key[Array, ""] | Array,
    buffer: int | None = None,
    skip_first: bool = False,
) -> "Shuffled":
    """Shuffled activations of one site, of real tokens alone.

    Args:
        model: The model, a subject (`mechjax.interop`), or any function with sites, which runs whole. Of a decoder,
            layers behind the site's are not run, of an encoder-decoder that is given one text the decoder is not.
        prompts: Batches of prompts, `Prompts`, ids (batch, pos), or what `mechjax.text.pack` gives, all of one shape;
            of a `ViT` batches of normalised images. Of other functions batches of whatever they take: arrays, tuples
            of arguments or dictionaries of named ones, as an encoder-decoder takes both its texts; `Prompts` and an
            `attention_mask` say what is padding.
        site: Whose activations. Axes without a name, and `pos`, `patch`, `height` and `width`, become rows; the others
            are laid side by side (heads of `z`, say). Where no axis has a name the last one is the row's.
        layer: Of which layer; None for a site outside the layers.
        batch: Rows of what is given.
        key: Shuffles.
        buffer: Rows that are held; None for 64 batches.
        skip_first: Whether the first real token of each text (of an image, the class token) is left out: it often is
            far larger than all others.

    Returns:
        A stream of arrays (batch, width). Rows that fill no whole batch at the end are not given.

    Raises:
        ArgumentError: A buffer of fewer than two batches; no batch that shows what the sites of a function are.
        SiteError: A site or layer that there is not, or without a vector at each position; padded texts of which it is
            not known which rows they gave.
        NeedsDecoderError: Something that cannot be called.
    """
    held = 64 * batch if buffer is None else buffer
    if batch < 1 or held < 2 * batch:
        raise ArgumentError(
            f"batch={batch}, buffer={held}: the buffer holds at least two batches, and shuffles well from some dozens "
            "on."
        )
    read = reading(model, prompts)
    columns = column_of(read, site, layer)

    def rows(some: Any) -> Some:
        given = batch_of(read.model, some, skip_first=skip_first)
        (every,), places = captured(read.model, given.given, columns)
        return every, np.flatnonzero(given.real(places))

    def told() -> str:
        said = site, layer, batch, held, skip_first, *model_digests(read).values()
        return hashlib.sha256(repr(said).encode()).hexdigest()

    return Shuffled(read.prompts, rows, batch, held, key, told)


def shuffled(rows: Iterable[Rows], batch: int, buffer: int, key: Key[Array, ""] | Array) -> "Shuffled":
    """Rows in random order, each once, through a buffer of so many.

    Args:
        rows: Rows, as many at a time as there are; each number of them is compiled for once.
        batch: Rows of what is given.
        buffer: Rows that are held.
        key: Shuffles.
    """
    return Shuffled(rows, lambda some: (jnp.asarray(some), np.arange(len(some))), batch, buffer, key)


class Shuffled(Iterator[Float[Array, "batch width"]]):
    """Batches of rows in random order, each row once; what it has come to can be written down and gone on with.

    Unlike other results of mechjax this changes as it is read, as iterators do.
    """

    def __init__(
        self,
        source: Iterable[Any],
        rows: Callable[[Any], Some],
        batch: int,
        buffer: int,
        key: Key[Array, ""] | Array,
        told: Callable[[], str] | None = None,
    ) -> None:
        """A stream at its beginning.

        Args:
            source: What rows are made of.
            rows: Makes them.
            batch: Rows of what is given.
            buffer: Rows that are held.
            key: Shuffles.
            told: A checksum of what rows are made with, computed when it is first asked for.
        """
        self._told = told
        self._source, self._rows, self._key = iter(source), rows, key
        self._batch, self._buffer = batch, buffer
        self._held: Rows | None = None  # (buffer, width), of which the first `_count` are rows of the source
        self._waiting: Some | None = None
        self._at = self._until = self._count = self._taken = 0
        self._last = False

    def __next__(self) -> Float[Array, "batch width"]:
        if self._at == self._until and not self._last:
            self._refill()
        if self._held is None or self._at == self._until:
            raise StopIteration
        self._at += self._batch
        return _part(self._held, jnp.int32(self._at - self._batch), self._batch)

    @cached_property
    def digest(self) -> str | None:
        """SHA-256 of the model and of how its rows are read, not of the prompts; None for rows of another making."""
        return None if self._told is None else self._told()

    def state(self) -> dict[str, np.ndarray]:
        """What is held and how far it has come, as arrays."""
        numbers = [self._at, self._until, self._count, self._taken, self._last]
        state = {
            "key": np.asarray(jax.random.key_data(self._key)),
            "numbers": np.asarray(numbers, np.int32),
        }
        if self._held is not None:
            state["held"] = np.asarray(self._held)
        if self._waiting is not None:
            state["waiting"] = np.asarray(self._waiting[0])[self._waiting[1]]
        return state

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave, of a stream that was made in the same way.

        Raises:
            CheckpointError: The source ends before that.
        """
        self._at, self._until, self._count, taken, last = (int(n) for n in state["numbers"])
        self._last = bool(last)
        held, waiting = (jnp.asarray(state[name]) if name in state else None for name in ("held", "waiting"))
        self._held = held
        self._waiting = None if waiting is None else (waiting, np.arange(len(waiting)))
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"]), impl=jax.random.key_impl(self._key))
        passed = sum(1 for _ in islice(self._source, taken - self._taken))
        if self._taken + passed < taken:
            raise CheckpointError(
                f"the stream had taken {taken} batches of prompts, and there are {self._taken + passed} now: give the "
                "prompts that it was begun with."
            )
        self._taken = taken

    def _refill(self) -> None:
        """New rows in the places of those that were given, and another order."""
        places = np.arange(self._buffer)
        free = places[(places < self._until) | (places >= self._count)]
        filled = 0
        while filled < len(free) and (some := self._some()) is not None:
            rows, given = some
            now = min(len(given), len(free) - filled)
            to = np.full(len(rows), self._buffer, np.int32)  # outside: not placed
            to[given[:now]] = free[filled : filled + now]
            if self._held is None:
                self._held = jnp.zeros((self._buffer, rows.shape[1]), rows.dtype)
            self._held = _placed(self._held, rows, jnp.asarray(to))
            filled += now
            self._waiting = (rows, given[now:]) if now < len(given) else None
        self._last, self._at = filled < len(free), 0
        there = np.ones(self._buffer, bool)
        there[free[filled:]] = False
        self._count = int(there.sum())
        half = max(self._buffer // 2 // self._batch, 1) * self._batch
        self._until = self._count // self._batch * self._batch if self._last else half
        if self._held is not None:
            self._key, own = jax.random.split(self._key)
            self._held = _mixed(self._held, jnp.asarray(there), own)

    def _some(self) -> Some | None:
        """Rows that wait, or the next of the source; None at its end."""
        if self._waiting is not None:
            return self._waiting
        if (item := next(self._source, None)) is None:
            return None
        self._taken += 1
        return self._rows(item)


@partial(jax.jit, static_argnums=2)
def _part(held: Float[Array, "row width"], start: Int[Array, ""], batch: int) -> Float[Array, "batch width"]:
    """Rows from `start` on."""
    return lax.dynamic_slice_in_dim(held, start, batch)


@partial(jax.jit, donate_argnums=0)
def _placed(
    held: Float[Array, "row width"], rows: Float[Array, "some width"], to: Int[Array, "some"]
) -> Float[Array, "row width"]:
    """With rows put to their places; those whose place is outside are left out."""
    return held.at[to].set(rows, mode="drop")


@jax.jit
def _mixed(
    held: Float[Array, "row width"], there: Bool[Array, "row"], key: Array
) -> Float[Array, "row width"]:
    """Rows in another order, those that are there first."""
    order = jax.random.permutation(key, len(held))
    return held[order[jnp.argsort(~there[order], stable=True)]]
