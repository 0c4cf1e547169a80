"""Attention of small texts by loops in float64, and the texts."""

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.models import Config

POS = 130  # not a whole number of a kernel's blocks
REAL = np.ones((2, POS), bool)
REAL[0, :7] = REAL[1, -9:] = False
SPLIT = REAL.copy()
SPLIT[0, 40:60] = False  # padding between real tokens


def config_of(**choices):
    return Config(
        d_vocab=31,
        n_ctx=256,
        d_model=32,
        n_layers=2,
        n_heads=4,
        d_head=8,
        **{"precision": "default"} | choices,
    )


def inputs_of(config, seed=0, batch=(2,), n_pos=POS, d_value=None):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(config.n_heads, 8), (config.n_kv_heads, 8), (config.n_kv_heads, d_value or 8)]
    q, k, v = (jax.random.normal(key, (*batch, n_pos, *s)) for key, s in zip(keys, shapes, strict=True))
    return q, 2 * k, v


def mixed(config, window, real, q, k, v):
    """Each head's mixture of values, one query at a time."""
    q, k, v = (np.asarray(x, np.float64).reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    n, n_pos, n_heads = q.shape[:3]
    real = np.ones((n, n_pos), bool) if real is None else np.broadcast_to(real, (n, n_pos))
    z = np.full((n, n_pos, n_heads, v.shape[-1]), np.nan)
    for example, query, head in np.ndindex(n, n_pos, n_heads):
        if not real[example, query]:
            continue
        keys = np.flatnonzero(real[example, : query + 1])[-(window or n_pos) :]
        of = head // (n_heads // k.shape[2])
        s = k[example, keys, of] @ q[example, query, head] * config.attn_scale
        if config.attn_softcap is not None:
            s = config.attn_softcap * np.tanh(s / config.attn_softcap)
        p = np.exp(s - s.max())
        z[example, query, head] = p @ v[example, keys, of] / p.sum()
    return z


def weights_of(z, real):
    """A random loss of what real tokens read: its gradient says all of a derivative."""
    w = jax.random.normal(jax.random.key(9), z.shape)
    return w if real is None else jnp.where(jnp.asarray(real)[..., None, None], w, 0)
