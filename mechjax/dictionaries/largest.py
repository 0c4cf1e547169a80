"""The largest latents: of each token, and of a whole batch. Exact, ties in order of rows and columns.

Also where a mesh splits latents: what goes between devices then are counts, never the latents themselves.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.dictionaries.products import Codes
from mechjax.parallel.mesh import n_model

GROUP = 16  # columns whose largest stands for them: fewest comparisons in all near the root of columns per kept one
WIDE = (
    256  # columns for each kept one from which groups are faster (measured, CPU: 18 ms against 26 at 12,288)
)
PARTS = 32  # parts of a batch, so many that XLA on CPUs shares them out over its threads (9 ms against 13 at 4,096)


def largest_of_each(
    z: Float[Array, "batch n"], k: int
) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
    """The `k` largest numbers of each row and where they are, largest first: what `lax.top_k` gives.

    On CPUs that is a sort by one thread, which is spared most of its work here: where columns are many, the largest of
    each group of columns tell which groups can hold any, else parts of the batch are sorted by several threads.
    """
    batch, n = z.shape
    if jax.default_backend() != "cpu":
        return _top_k(z, k)
    if n >= WIDE * k and n % GROUP == 0:
        groups = z.reshape(batch, n // GROUP, GROUP)
        chosen = jnp.sort(
            lax.top_k(groups.max(-1), k)[1], -1
        )  # in order, so that ties are as in the whole row
        candidates = jnp.take_along_axis(groups, chosen[..., None], 1).reshape(batch, -1)
        values, at = lax.top_k(candidates, k)
        return values, jnp.take_along_axis(chosen, at // GROUP, -1) * GROUP + at % GROUP
    if batch % PARTS:
        return _top_k(z, k)
    parts = [_top_k(part, k) for part in jnp.split(z, PARTS)]
    return jnp.concatenate([values for values, _ in parts]), jnp.concatenate([at for _, at in parts])


def _top_k(z: Array, k: int) -> tuple[Array, Array]:
    values, at = lax.top_k(z, k)
    return values, at


def codes_of_each(z: Float[Array, "batch n"], k: int) -> Codes:
    """The `k` largest latents of each token, as pairs; all latents with -inf elsewhere where a mesh splits them."""
    if n_model() == 1:
        return Codes(*largest_of_each(z, k))
    return Codes(jnp.where(_largest(z, k, -1), z, -jnp.inf))


def largest_of_all(z: Float[Array, "batch n"], n: int) -> Bool[Array, "batch n"]:
    """Where the `n` largest positive numbers of a batch are, ties in order of rows and columns."""
    return _largest(z, n, None)


def _largest(z: Array, n: int, axis: int | None) -> Array:
    """Where the `n` largest positive numbers of each row (`axis` is -1) or of all (None) are.

    Positive numbers are ordered as their bits are, so the n-th largest is found bit by bit, each by one count: no sort
    of everything, and on a mesh one sum of counts for each bit. Which of equal numbers come first is told by counts of
    each part of a row that lies on one device.
    """
    positive = jax.nn.relu(z)
    kind = jnp.uint32 if z.dtype.itemsize == 4 else jnp.uint16 if z.dtype.itemsize == 2 else jnp.uint64
    bits, width = lax.bitcast_convert_type(positive, kind), 8 * z.dtype.itemsize
    count = lambda which: which.sum(axis, dtype=jnp.int32, keepdims=True)

    def narrow(i: Array, bound: Array) -> Array:
        higher = bound | (jnp.ones((), kind) << (width - 2 - i).astype(kind))
        return jnp.where(count(bits >= higher) >= n, higher, bound)

    bound = lax.fori_loop(0, width - 1, narrow, jnp.zeros((z.shape[0] if axis else 1, 1), kind))
    above, ties = bits > bound, bits == bound
    parts = ties.reshape(len(z), n_model(), -1)
    within, each = jnp.cumsum(parts, -1, dtype=jnp.int32), parts.sum(-1, dtype=jnp.int32)
    before = jnp.cumsum(each if axis else each.reshape(1, -1), -1, dtype=jnp.int32).reshape(each.shape) - each
    earlier = (within + before[..., None]).reshape(z.shape)
    return (above | (ties & (earlier <= n - count(above)))) & (z > 0)
