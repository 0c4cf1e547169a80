"""Attention of long texts without their patterns: memory grows with the text, not with its square.

Scores are formed for one block of queries and one of keys at a time. Going over the keys, each query keeps its greatest
score m, its sum l of exp(s - m) and its sum of exp(s - m) v, whose quotient is its mixture of values (Milakov and
Gimelshein 2018, arXiv:1805.02867; Rabe and Staats 2021, arXiv:2112.05682). Blocks in which no query sees a key are left
out.

Derivatives form the blocks again from L = m + log l (Dao et al. 2022, arXiv:2205.14135, appendix B): with
p = exp(s - L), they are dL = sum p ds and dz = sum p ds v + sum p dv - z dL. Written as tangents, which JAX transposes,
they compose in both modes.

Exact, but for the order of sums. Cost: that of the blocks that are seen; derivatives form the scores once more.
"""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.models.config import Config
from mechjax.models.contraction import widened
from mechjax.models.positions import Places
from mechjax.models.scores import MASKED, mix, scores

_BLOCK = 512  # at most so many queries, and keys, in a block
_NOWHERE = 2**31 - 1  # the slot of what fills up the last block of keys: after every query's

Sides = tuple[Places, Places, Int[Array, ""] | None]
"""Where the queries and the keys stand, and how many positions a query sees (None: all)."""

_checkpoint = partial(jax.checkpoint, prevent_cse=False)  # inside loops nothing merges the two runs


def fits_one_block(n_queries: int, n_keys: int) -> bool:
    """Whether a head's scores are no more than a block of them, so that there is nothing to save."""
    return n_queries * n_keys <= _BLOCK**2


def fused(
    q: Float[Array, "*batch query head d_head"],
    k: Float[Array, "*batch key kv_head d_head"],
    v: Float[Array, "*batch key kv_head d_value"],
    sides: Sides,
    sinks: Float[Array, " head"] | None,
    config: Config,
) -> Float[Array, "*batch query head d_value"]:
    """Each head's mixture of values: `mix` of the softmax of `scores`, sinks beside them."""
    return _blockwise(config, q, k, v, sinks, sides)[0].astype(q.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _blockwise(
    config: Config, q: Array, k: Array, v: Array, sinks: Array | None, sides: Sides
) -> tuple[Float[Array, "*batch query head d_value"], Float[Array, "*batch head query"]]:
    """Mixtures of values, and L; both in float32 at least."""
    queries, keys, window = sides
    over_keys = _split(k, -3), _split(v, -3), _placed(keys, _NOWHERE)
    wide = v.dtype if jnp.finfo(v.dtype).bits > 32 else jnp.float32

    def row(xs: tuple[Array, Places]) -> tuple[Array, Array]:
        q, queries = xs

        def step(so_far: tuple[Array, Array, Array], xs: tuple[Array, Array, Places]) -> tuple[Any, None]:
            k, v, keys = xs

            def further() -> tuple[Array, Array, Array]:
                greatest, total, mixed = so_far
                s = scores(q, k, queries, keys, window, config)
                top = jnp.maximum(greatest, s.max(-1))
                p, kept = jnp.exp(s - top[..., None]), jnp.exp(greatest - top)
                mixed = _rows(kept, mixed) * mixed + mix(p.astype(v.dtype), v, config, wide)
                return top, kept * total + p.sum(-1), mixed

            return lax.cond(_near(queries, keys, window), further, lambda: so_far), None

        shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
        if sinks is None:
            top, total = jnp.full(shape, MASKED, wide), jnp.zeros(shape, wide)
        else:
            top = jnp.broadcast_to(sinks.astype(wide)[:, None], shape)
            total = jnp.ones(shape, wide)
        start = top, total, jnp.zeros((*q.shape[:-1], v.shape[-1]), wide)
        (top, total, mixed), _ = lax.scan(step, start, over_keys)
        return mixed / _rows(total, mixed), top + jnp.log(total)

    z, norm = lax.map(row, (_split(q, -3), _placed(queries, 0)))
    return _joined(z, -3, q.shape[-3]), _joined(norm, -1, q.shape[-3])


@_blockwise.defjvp
def _tangents(config: Config, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    q, k, v, sinks, (queries, keys, window) = primals
    dq, dk, dv, dsinks, _ = tangents
    z, norm = _blockwise(config, *primals)

    # The inner checkpoint forms a block again for its transpose; the outer keeps one copy of the keys, not one per row.
    @_checkpoint
    def row(xs: tuple[Array, Array, Array, Array, Places], over_keys: Any) -> tuple[Array, Array]:
        q, dq, z, norm, queries = xs
        nothing = jnp.zeros_like(z), jnp.zeros_like(norm)

        @_checkpoint
        def piece(k: Array, v: Array, dk: Array, dv: Array, keys: Places) -> tuple[Array, Array]:
            def formed() -> tuple[Array, Array]:
                of = lambda q, k: scores(q, k, queries, keys, window, config)
                s, ds = jax.jvp(of, (q, k), (dq, dk))
                p = jnp.exp(s - norm[..., None])
                pds = p * ds
                moved = mix(pds.astype(v.dtype), v, config, z.dtype) + mix(
                    p.astype(v.dtype), dv, config, z.dtype
                )
                return moved, pds.sum(-1)

            return lax.cond(_near(queries, keys, window), formed, lambda: nothing)

        def step(so_far: Any, xs: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, so_far, piece(*xs)), None

        (moved, dnorm), _ = lax.scan(step, nothing, over_keys)
        if sinks is not None:
            pull, dpull = (widened(x)[:, None] for x in (sinks, dsinks))
            dnorm = dnorm + jnp.exp(pull - norm) * dpull
        return moved - _rows(dnorm, z) * z, dnorm

    over_keys = *(_split(x, -3) for x in (k, v, dk, dv)), _placed(keys, _NOWHERE)
    over_queries = *(_split(x, -3) for x in (q, dq, z)), _split(norm, -1), _placed(queries, 0)
    dz, dnorm = lax.map(lambda xs: row(xs, over_keys), over_queries)
    return (z, norm), (_joined(dz, -3, q.shape[-3]), _joined(dnorm, -1, q.shape[-3]))


def _near(queries: Places, keys: Places, window: Int[Array, ""] | None) -> Bool[Array, ""]:
    """Whether some query of a block may see some key of another, padding aside."""
    near = keys.slot.min() <= queries.slot.max()
    if window is not None and queries.order is not None and keys.order is not None:
        near = near & (queries.order.min() - keys.order.max() < window)
    return near


def _rows(x: Float[Array, "*batch head query"], like: Array) -> Float[Array, "*batch query head 1"]:
    """One number per query and head, as a factor of mixtures."""
    return jnp.swapaxes(x, -1, -2)[..., None].astype(like.dtype)


def _split(x: Array, axis: int, beyond: int = 0) -> Array:
    """Blocks of one size along an axis, their number in front; the last is filled up with `beyond`."""
    n, axis = x.shape[axis], axis % x.ndim
    size = math.ceil(n / math.ceil(n / _BLOCK))
    filled = jnp.pad(x, [(0, -n % size if i == axis else 0) for i in range(x.ndim)], constant_values=beyond)
    return jnp.moveaxis(filled.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _joined(blocks: Array, axis: int, n: int) -> Array:
    """The first `n` entries of what was split."""
    axis = axis % (blocks.ndim - 1)
    x = jnp.moveaxis(blocks, 0, axis)
    return lax.slice_in_dim(x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :]), 0, n, axis=axis)


def _placed(places: Places, beyond: int) -> Places:
    split = jax.tree.map(lambda x: _split(x, -1), places)
    return eqx.tree_at(lambda places: places.slot, split, _split(places.slot, -1, beyond))
