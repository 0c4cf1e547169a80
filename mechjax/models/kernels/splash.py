"""Attention on TPUs through splash attention, which is in JAX's own tree (`jax.experimental.pallas`).

It is FlashAttention (Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691) that leaves out blocks of keys that
its mask hides. Padding is another segment; a third one fills texts up to whole blocks.

It has no factor on scores: queries are multiplied by it, and rounded once more where it is no power of two. Products
are bfloat16 passes summed in float32, whatever the dtype (its source asks for no precision, which is the default):
`choice` keeps it from models that ask for more.

Gradients are the kernel's own, which run its forward pass again.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.models.config import Config

_LANES = 128
_BLOCKS = (512, 256, 128)  # queries and keys of a block: the largest that divides the filled text; not tuned
_LONG = 4096  # from here on texts are filled up to the largest blocks, an eighth more at most: masks are made by block
_FILLING = 2  # segment of what a text is filled up with; real tokens are 1, padding is 0


def mixed(
    config: Config,
    window: int | None,
    real: Bool[Array, "... pos"] | None,
    q: Float[Array, "*batch pos head d_head"],
    k: Float[Array, "*batch pos kv_head d_head"],
    v: Float[Array, "*batch pos kv_head d_value"],
    *,
    interpret: bool = False,
) -> Float[Array, "*batch pos head d_value"]:
    """Each head's mixture of values.

    Args:
        config: The model's.
        window: How many positions a query sees; None for all.
        real: Which tokens are real; None where all are.
        q: Queries.
        k: Keys.
        v: Values.
        interpret: Whether to run the kernel as plain JAX, on any device, which is slow.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    batch, n_pos, n_heads = q.shape[:-3], q.shape[-3], q.shape[-2]
    filling = -n_pos % (_BLOCKS[0] if n_pos >= _LONG else _LANES)
    q = (q.astype(jnp.float32) * config.attn_scale).astype(q.dtype)

    def by_head(x: Array) -> Array:
        x = x.reshape(-1, *x.shape[-3:])
        return jnp.pad(x, ((0, 0), (0, filling), (0, 0), (0, 0))).swapaxes(1, 2)

    q, k, v = by_head(q), by_head(k), by_head(v)
    segments = None
    if real is not None or filling:
        ids = jnp.ones((*batch, n_pos), jnp.int32) if real is None else real.astype(jnp.int32)
        ids = jnp.broadcast_to(ids, (*batch, n_pos)).reshape(-1, n_pos)
        ids = jnp.pad(ids, ((0, 0), (0, filling)), constant_values=_FILLING)
        segments = splash.SegmentIds(ids, ids)
    kernel = _kernel(splash, n_pos + filling, n_heads, window, config.attn_softcap, interpret)
    z = jax.vmap(kernel)(q, k, v, segments)
    return z.swapaxes(1, 2)[:, :n_pos].reshape(*batch, n_pos, n_heads, -1)


def _kernel(
    splash: Any, n_pos: int, n_heads: int, window: int | None, softcap: float | None, interpret: bool
) -> Any:
    """The kernel of one text, with the mask of all its heads."""
    shape = (n_pos, n_pos)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    block = next(size for size in _BLOCKS if n_pos % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * n_heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=softcap, interpret=interpret,
    )  # fmt: skip
