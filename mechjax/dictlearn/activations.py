"""Activations of a model as a stream of shuffled batches, which dictionaries are trained on.

Tokens of one text lie side by side and are alike; a dictionary wants them apart. A buffer on the device holds many
rows, batches are drawn from all of it in random order, and what half of it gave is filled with new rows: each row is
given exactly once. The stream can be written down and gone on with (`Shuffled.state`), to the bit.

Cost: for each batch of prompts a forward of the model up to the site's layer; memory of `buffer` rows and a little.
Misleads when: the buffer is small beside the length of texts: rows of one text then meet in one batch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.models import Decoder, Encoder
from mechjax.store.rows import batch_of, captured, columns_of

Rows = Float[Array, "_ width"]


def activations(
    model: Decoder | Encoder,
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
        model: The model; of a decoder, layers behind the site's are not run.
        prompts: Batches of prompts, `Prompts`, ids (batch, pos), or what `mechjax.text.pack` gives, all of one shape.
        site: Whose activations; axes after the position are laid side by side (heads of `z`, say).
        layer: Of which layer; None for a site outside the layers.
        batch: Rows of what is given.
        key: Shuffles.
        buffer: Rows that are held; None for 64 batches.
        skip_first: Whether the first real token of each text is left out: it often is far larger than all others.

    Returns:
        A stream of arrays (batch, width). Rows that fill no whole batch at the end are not given.

    Raises:
        ArgumentError: A buffer of fewer than two batches.
        SiteError: A site or layer that there is not, or without a vector at each position.
    """
    held = 64 * batch if buffer is None else buffer
    if batch < 1 or held < 2 * batch:
        raise ArgumentError(
            f"batch={batch}, buffer={held}: the buffer holds at least two batches, and shuffles well from some dozens "
            "on."
        )
    columns = columns_of(model, site, layer)

    def rows(some: Any) -> Rows:
        given = batch_of(model, some, skip_first=skip_first)
        return captured(model, (given.ids, given.mask, given.positions), columns)[0][given.real]

    return Shuffled(prompts, rows, batch, held, key)


def shuffled(rows: Iterable[Rows], batch: int, buffer: int, key: Key[Array, ""] | Array) -> "Shuffled":
    """Rows in random order, each once, through a buffer of so many.

    Args:
        rows: Rows, as many at a time as there are.
        batch: Rows of what is given.
        buffer: Rows that are held.
        key: Shuffles.
    """
    return Shuffled(rows, lambda some: some, batch, buffer, key)


class Shuffled(Iterator[Float[Array, "batch width"]]):
    """Batches of rows in random order, each row once; what it has come to can be written down and gone on with.

    Unlike other results of mechjax this changes as it is read, as iterators do.
    """

    def __init__(
        self,
        source: Iterable[Any],
        rows: Callable[[Any], Rows],
        batch: int,
        buffer: int,
        key: Key[Array, ""] | Array,
    ) -> None:
        """A stream at its beginning.

        Args:
            source: What rows are made of.
            rows: Makes them.
            batch: Rows of what is given.
            buffer: Rows that are held.
            key: Shuffles.
        """
        self._source, self._rows, self._key = iter(source), rows, key
        self._batch, self._buffer = batch, buffer
        self._held: Rows | None = None
        self._waiting: Rows | None = None
        self._at = self._until = self._taken = 0
        self._last = False

    def __next__(self) -> Float[Array, "batch width"]:
        if self._at == self._until and not self._last:
            self._refill()
        if self._held is None or self._at == self._until:
            raise StopIteration
        self._at += self._batch
        return self._held[self._at - self._batch : self._at]

    def state(self) -> dict[str, np.ndarray]:
        """What is held and how far it has come, as arrays."""
        kept = {"held": self._held, "waiting": self._waiting}
        numbers = [self._at, self._until, self._taken, self._last]
        return {name: np.asarray(x) for name, x in kept.items() if x is not None} | {
            "key": np.asarray(jax.random.key_data(self._key)),
            "numbers": np.asarray(numbers, np.int32),
        }

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what `state` gave, of a stream that was made in the same way.

        Raises:
            CheckpointError: The source ends before that.
        """
        self._at, self._until, taken, last = (int(n) for n in state["numbers"])
        self._last = bool(last)
        self._held, self._waiting = (
            jnp.asarray(state[name]) if name in state else None for name in ("held", "waiting")
        )
        self._key = jax.random.wrap_key_data(jnp.asarray(state["key"]), impl=jax.random.key_impl(self._key))
        passed = sum(1 for _ in islice(self._source, taken - self._taken))
        if self._taken + passed < taken:
            raise CheckpointError(
                f"the stream had taken {taken} batches of prompts, and there are {self._taken + passed} now: give the "
                "prompts that it was begun with."
            )
        self._taken = taken

    def _refill(self) -> None:
        """New rows for those that were given, in another order."""
        held = None if self._held is None else self._held[self._until :]
        missing = self._buffer - (0 if held is None else len(held))
        fresh = self._fresh(missing)
        held = fresh if held is None else held if fresh is None else jnp.concatenate([held, fresh])
        self._held, self._at, self._until = held, 0, 0
        self._last = fresh is None or len(fresh) < missing
        if held is None:
            return
        self._key, own = jax.random.split(self._key)
        self._held = _mixed(held, own)
        half = max(self._buffer // 2 // self._batch, 1) * self._batch
        self._until = len(held) // self._batch * self._batch if self._last else half

    def _fresh(self, n: int) -> Rows | None:
        """The next `n` rows, or as many as there are."""
        some = [] if self._waiting is None else [self._waiting]
        count = sum(map(len, some))
        while count < n and (item := next(self._source, None)) is not None:
            self._taken += 1
            some.append(self._rows(item))
            count += len(some[-1])
        if not count:
            return None
        every = some[0] if len(some) == 1 else jnp.concatenate(some)
        self._waiting = every[n:] if count > n else None
        return every[:n]


@jax.jit
def _mixed(held: Float[Array, "row width"], key: Array) -> Float[Array, "row width"]:
    """Rows in another order."""
    return held[jax.random.permutation(key, len(held))]
