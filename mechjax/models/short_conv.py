"""The causal convolution of few taps, each channel by itself, over the real tokens alone.

`y[t] = sum_j w[:, j] * x[t - (d_conv - 1) + j]`. What came before the text counts as zero, and padding as not there:
each token sees the real ones before it, wherever padding stands between them.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.models.contraction import widened


def short_conv(
    x: Float[Array, "*batch pos channel"],
    w: Float[Array, "channel tap"],
    b: Float[Array, " channel"] | None,
    window: Float[Array, "*batch before channel"],
    mask: Bool[Array, "*batch pos"] | None,
) -> tuple[Float[Array, "*batch pos channel"], Float[Array, "*batch before channel"]]:
    """The convolved channels, and the window of the next tokens.

    Args:
        x: Channels.
        w: Weights; the last is of the current token.
        b: Bias, or None.
        window: The channels of the `tap - 1` real tokens before, oldest first; zeros where there are none.
        mask: True for real tokens; None for all.
    """
    n_pos, n_before = x.shape[-2], window.shape[-2]
    every = jnp.concatenate((window.astype(x.dtype), x), -2)
    if mask is None:
        taps = [every[..., j : j + n_pos, :] for j in range(n_before + 1)]
        kept = every[..., n_pos:, :]
    else:
        order, rank = _order(mask, n_before)
        taps = [_rows(every, order, rank - n_before + j) for j in range(n_before + 1)]
        last = rank[..., -1:] + jnp.arange(1 - n_before, 1)
        kept = _rows(every, order, last)
    y = sum((widened(tap) * widened(w[:, j]) for j, tap in enumerate(taps)), jnp.float32(0.0))
    y = y if b is None else y + widened(b)
    return y.astype(x.dtype), kept


def _order(
    mask: Bool[Array, "*batch pos"], n_before: int
) -> tuple[Int[Array, "*batch every"], Int[Array, "*batch pos"]]:
    """Where the real tokens stand, in order; and which of them each token is, padding the last real one before it."""
    real = jnp.concatenate((jnp.ones((*mask.shape[:-1], n_before), bool), mask), -1)
    order = jnp.argsort(~real, -1, stable=True).astype(jnp.int32)
    return order, jnp.cumsum(real, -1, dtype=jnp.int32)[..., n_before:] - 1


def _rows(every: Array, order: Array, which: Array) -> Array:
    at = jnp.take_along_axis(order, jnp.maximum(which, 0), -1)
    return jnp.take_along_axis(every, at[..., None], -2)
