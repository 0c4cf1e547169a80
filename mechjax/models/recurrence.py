"""The recurrence of state space models, `h[t] = exp(delta[t] A) h[t-1] + delta[t] x[t] B[t]`, read by `C[t] . h[t]`.

Three ways to the same numbers. `one_by_one` runs token by token, and every state is a site. `in_chunks` keeps no state
but the last (Mamba; Gu and Dao 2023, arXiv:2312.00752): its memory is that of one token forward and, since chunks are
run again there, of one chunk backward. `by_products` turns a chunk into matrix products, where a head has one rate
(Mamba-2; Dao and Gu 2024, arXiv:2405.21060, section 6). All run in float32 at least.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mechjax.models.contraction import contract, widened
from mechjax.models.mamba_config import MambaConfig

CHUNK = 16
"""Tokens whose states stand in memory at once backward; forward, 16 is as fast as 64 on CPU."""
PRODUCT_CHUNK = 64
"""Tokens of a chunk of matrix products, as in the paper's kernels (64 to 256); work in it grows with its square."""

Inputs = tuple[Array, Array, Array, Array]
"""delta and x of shape (*batch, pos, *channel), B and C of shape (*batch, pos, *channel's or ones, d_state)."""


def one_by_one(
    inputs: Inputs, A: Float[Array, "..."], state: Float[Array, "..."], mark: Callable[[Array, Array], Array]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """What is read at every position, and the last state, every state by itself.

    Args:
        inputs: Of every position; a delta of zero leaves the state as it is.
        A: Rates. Shape (*channel, d_state), or what broadcasts to it.
        state: The state before the first position. Shape (*batch, *channel, d_state).
        mark: `mark(state, t)` names the state at position t, of shape (*batch, 1, *channel, d_state), and may change
            it: what it gives is what is read, and what the next state is made of.
    """
    pos = -A.ndim - 1

    def step(h: Array, xs: tuple[Inputs, Array]) -> tuple[Array, Array]:
        (delta, x, B, C), t = xs
        h = jnp.exp(delta[..., None] * A) * h + (delta * x)[..., None] * B
        h = mark(jnp.expand_dims(h, pos), t).squeeze(pos)
        return h, (h * C).sum(-1)

    each = _by_position(inputs, A)
    state, y = lax.scan(step, widened(state), (each, jnp.arange(each[0].shape[0], dtype=jnp.int32)))
    return jnp.moveaxis(y, 0, y.ndim - A.ndim), state


def in_chunks(
    delta: Float[Array, "*batch pos d_inner"],
    x: Float[Array, "*batch pos d_inner"],
    B: Float[Array, "*batch pos d_state"],
    C: Float[Array, "*batch pos d_state"],
    A: Float[Array, "d_inner d_state"],
    state: Float[Array, "*batch d_inner d_state"],
    config: MambaConfig,
) -> tuple[Float[Array, "*batch pos d_inner"], Float[Array, "*batch d_inner d_state"]]:
    """What is read at every position, and the last state, of channels with rates of their own, which share B and C."""
    n_pos, rates = x.shape[-2], A.T

    def step(h: Array, xs: Inputs) -> tuple[Array, Array]:
        delta, x, B, C = xs
        h = jnp.exp(delta[..., None, :] * rates) * h + B[..., None] * (delta * x)[..., None, :]
        # As a sum of products XLA would fuse the reading with what makes the state: on CPU several times as slow.
        return h, contract("...n,...ni->...i", C, h, config)

    @jax.checkpoint
    def chunk(h: Array, xs: Inputs) -> tuple[Array, Array]:
        return lax.scan(step, h, xs)

    each = tuple(jnp.moveaxis(widened(v), -2, 0) for v in (delta, x, B, C))
    last, y = lax.scan(chunk, jnp.swapaxes(widened(state), -1, -2), _chunked(each, CHUNK))
    y = y.reshape(math.prod(y.shape[:2]), *y.shape[2:])[:n_pos]
    return jnp.moveaxis(y, 0, -2), jnp.swapaxes(last, -1, -2)


def by_products(
    delta: Float[Array, "*batch pos head"],
    x: Float[Array, "*batch pos head d_head"],
    B: Float[Array, "*batch pos group d_state"],
    C: Float[Array, "*batch pos group d_state"],
    A: Float[Array, " head"],
    state: Float[Array, "*batch head d_head d_state"],
    config: MambaConfig,
) -> tuple[Float[Array, "*batch pos head d_head"], Float[Array, "*batch head d_head d_state"]]:
    """What is read at every position, and the last state, of heads with one rate each and B and C by group."""
    n_pos, (n_heads, d_head), n_groups = x.shape[-3], x.shape[-2:], B.shape[-2]
    by_group = (n_groups, n_heads // n_groups)
    delta, x, B, C = (widened(each) for each in (delta, x, B, C))
    write = (delta[..., None] * x).reshape(*x.shape[:-2], *by_group, d_head)
    decay = (delta * A).reshape(*delta.shape[:-1], *by_group)
    each = tuple(jnp.moveaxis(v, v.ndim - n, 0) for v, n in ((decay, 3), (write, 4), (B, 3), (C, 3)))

    @jax.checkpoint
    def chunk(h: Array, xs: Inputs) -> tuple[Array, Array]:
        decay, write, B, C = xs  # the chunk's positions first
        between = jnp.exp(_sums_between(decay, config))  # (*batch, group, head, to, from)
        start = jnp.exp(jnp.moveaxis(jnp.cumsum(decay, 0), 0, -1))  # (*batch, group, head, to)
        seen = contract("l...gn,s...gn->...gls", C, B, config)[..., None, :, :] * between
        y = contract("...ghls,s...ghd->l...ghd", seen, write, config)
        y = y + contract("l...gn,...ghdn->l...ghd", C, h, config) * jnp.moveaxis(start, -1, 0)[..., None]
        left = jnp.moveaxis(between[..., -1, :], -1, 0)[..., None] * write
        h = start[..., -1, None, None] * h + contract("s...gn,s...ghd->...ghdn", B, left, config)
        return h, y

    h = widened(state).reshape(*state.shape[:-3], *by_group, *state.shape[-2:])
    h, y = lax.scan(chunk, h, _chunked(each, PRODUCT_CHUNK))
    y = jnp.moveaxis(y.reshape(math.prod(y.shape[:2]), *y.shape[2:])[:n_pos], 0, -4)
    return y.reshape(*y.shape[:-3], n_heads, d_head), h.reshape(state.shape)


def _sums_between(decay: Array, config: MambaConfig) -> Array:
    """Sums of the terms after `from` up to `to`, minus infinity where `from` is later.

    Each is summed by itself: differences of running sums would round at the size of those.
    """
    n = decay.shape[0]
    after = jnp.tril(jnp.ones((n, n), bool), -1)  # (k, from)
    terms = jnp.where(after, jnp.moveaxis(decay, 0, -1)[..., None], 0.0)
    up_to = jnp.tril(jnp.ones((n, n), terms.dtype))  # (to, k)
    sums = contract("lk,...ks->...ls", up_to, terms, config)
    return jnp.where(up_to > 0, sums, -jnp.inf)


def _by_position(inputs: Inputs, A: Array) -> Inputs:
    """The inputs, positions first, in float32 at least."""
    lasts = (A.ndim, A.ndim, A.ndim + 1, A.ndim + 1)
    delta, x, B, C = (jnp.moveaxis(widened(v), v.ndim - n, 0) for v, n in zip(inputs, lasts, strict=True))
    return delta, x, B, C


def _chunked(each: tuple[Array, ...], size: int) -> tuple[Array, ...]:
    """Positions, which are first, in chunks; zeros at the end, which leave the state as it is."""
    n_pos = each[0].shape[0]
    size = min(size, n_pos)
    more = -n_pos % size
    padded = (jnp.pad(v, ((0, more), *((0, 0),) * (v.ndim - 1))) for v in each)
    return tuple(v.reshape((n_pos + more) // size, size, *v.shape[1:]) for v in padded)
