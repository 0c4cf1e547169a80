"""Activations of a model as a stream of shuffled batches, which dictionaries are trained on.

Tokens of one text lie side by side and are alike; a dictionary wants them apart. A buffer on the device holds many
rows, batches are drawn from all of it in random order, and what half of it gave is filled with new rows: each row is
given exactly once.

Cost: a forward of the model for each batch of prompts, its unembedding left out; memory of `buffer` rows and a little.
Misleads when: the buffer is small beside the length of texts: rows of one text then meet in one batch.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mechjax.base.errors import ArgumentError
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.transform.transforms import capture


def activations(
    model: Decoder,
    prompts: Iterable[Any],
    site: str,
    *,
    layer: int,
    batch: int,
    key: Key[Array, ""] | Array,
    buffer: int | None = None,
    skip_first: bool = False,
) -> Iterator[Float[Array, "batch width"]]:
    """Shuffled activations of one site, of real tokens alone.

    Args:
        model: The decoder.
        prompts: Batches of prompts, `Prompts` or ids (batch, pos), all of one shape.
        site: Whose activations; axes after the position are laid side by side (heads of `z`, say).
        layer: Of which layer.
        batch: Rows of what is given.
        key: Shuffles.
        buffer: Rows that are held; None for 64 batches.
        skip_first: Whether the first real token of each text is left out: it often is far larger than all others.

    Yields:
        Arrays (batch, width). Rows that fill no whole batch at the end are not given.

    Raises:
        ArgumentError: A buffer of fewer than two batches.
        SiteError: A site or layer that there is not.
    """
    held = 64 * batch if buffer is None else buffer
    if batch < 1 or held < 2 * batch:
        raise ArgumentError(
            f"batch={batch}, buffer={held}: the buffer holds at least two batches, and shuffles well from some dozens "
            "on."
        )
    return shuffled(_rows(model, prompts, site, layer, skip_first), batch, held, key)


def _rows(
    model: Decoder, prompts: Iterable[Any], site: str, layer: int, skip_first: bool
) -> Iterator[Float[Array, "_ width"]]:
    """The rows of each batch of prompts, in their order."""
    for some in prompts:
        ids, mask = as_tokens(some, None, model.config)
        rows = _captured(model, ids, mask, site, layer)
        real = jnp.ones(ids.shape, bool) if mask is None else mask
        if skip_first:
            real = _without_first(real)
        yield rows[real.reshape(-1)]


@eqx.filter_jit
def _captured(
    model: Decoder, ids: Int[Array, "batch pos"], mask: Array | None, site: str, layer: int
) -> Array:
    """One row for each token. What nothing reads, such as logits, is not computed."""
    return capture(model, [site], layers=layer)(ids, mask=mask)[1][site].reshape(ids.size, -1)


def _without_first(real: Bool[Array, "batch pos"]) -> Bool[Array, "batch pos"]:
    return real & (jnp.cumsum(real, -1) > 1)


def shuffled(
    rows: Iterable[Float[Array, "_ width"]], batch: int, buffer: int, key: Key[Array, ""] | Array
) -> Iterator[Float[Array, "batch width"]]:
    """Rows in random order, each once, through a buffer of so many.

    Args:
        rows: Rows, as many at a time as there are.
        batch: Rows of what is given.
        buffer: Rows that are held.
        key: Shuffles.
    """
    stream, waiting, held = iter(rows), None, None
    half = max(buffer // 2 // batch, 1) * batch
    while True:
        missing = buffer - (0 if held is None else len(held))
        fresh, waiting = _taken(stream, waiting, missing)
        held = fresh if held is None else held if fresh is None else jnp.concatenate([held, fresh])
        if held is None:
            return
        whole = fresh is not None and len(fresh) == missing
        key, own = jax.random.split(key)
        held = _mixed(held, own)
        given = half if whole else len(held) // batch * batch
        for start in range(0, given, batch):
            yield held[start : start + batch]
        held = held[given:]
        if not whole:
            return


def _taken(stream: Iterator[Array], waiting: Array | None, n: int) -> tuple[Array | None, Array | None]:
    """The next `n` rows, or as many as there are, and those that came along beyond them."""
    some, count = ([] if waiting is None else [waiting]), 0 if waiting is None else len(waiting)
    while count < n and (more := next(stream, None)) is not None:
        some.append(more)
        count += len(more)
    if not count:
        return None, None
    every = some[0] if len(some) == 1 else jnp.concatenate(some)
    return every[:n], every[n:] if count > n else None


@jax.jit
def _mixed(held: Float[Array, "row width"], key: Array) -> Float[Array, "row width"]:
    """Rows in another order."""
    return held[jax.random.permutation(key, len(held))]
