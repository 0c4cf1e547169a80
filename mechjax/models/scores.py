"""What each query gives each key, and the mixture of values that comes of it: of all of them, or of a block of each.

Scores are float32 at least, whatever the model's dtype.
"""

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.positions import Places

MASKED = float(jnp.finfo(jnp.float32).min)
"""Score of a key that a query does not see; finite, so that differences and gradients of scores are numbers."""


def scores(
    q: Float[Array, "*batch query head d_head"],
    k: Float[Array, "*batch key kv_head d_head"],
    queries: Places,
    keys: Places,
    window: Int[Array, ""] | None,
    config: Config,
) -> Float[Array, "*batch head query key"]:
    """Scores, soft-capped and masked."""
    groups = (config.n_kv_heads, config.n_heads // config.n_kv_heads)
    grouped = q.reshape(*q.shape[:-2], *groups, config.d_head)
    wide = q.dtype if jnp.finfo(q.dtype).bits > 32 else jnp.float32
    scores = contract("...qngd,...knd->...ngqk", grouped, k, config, wide) * config.attn_scale
    scores = scores.reshape(*scores.shape[:-4], config.n_heads, *scores.shape[-2:])
    if queries.height is not None and keys.height is not None:
        scores = scores + (keys.height[..., None, :] - queries.height[..., :, None]).astype(wide)
    if config.attn_softcap is not None:
        scores = config.attn_softcap * jnp.tanh(scores / config.attn_softcap)
    return jnp.where(visible(queries, keys, window)[..., None, :, :], scores, MASKED)


def visible(queries: Places, keys: Places, window: Int[Array, ""] | None) -> Bool[Array, "*batch query key"]:
    """Which key each query sees."""
    seen = keys.slot[..., None, :] <= queries.slot[..., :, None]
    if queries.real is not None and keys.real is not None:
        seen = seen & (queries.real[..., :, None] == keys.real[..., None, :])
    if window is not None and queries.order is not None and keys.order is not None:
        seen = seen & (queries.order[..., :, None] - keys.order[..., None, :] < window)
    return seen


def mix(
    pattern: Float[Array, "*batch head query key"],
    v: Float[Array, "*batch key kv_head d_value"],
    config: Config,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch query head d_value"]:
    """Values, mixed by a pattern."""
    groups = (config.n_kv_heads, config.n_heads // config.n_kv_heads)
    grouped = pattern.reshape(*pattern.shape[:-3], *groups, *pattern.shape[-2:])
    z = contract("...ngqk,...knd->...qngd", grouped, v, config, dtype)
    return z.reshape(*z.shape[:-3], config.n_heads, v.shape[-1])
