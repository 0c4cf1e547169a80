"""Attention on NVIDIA GPUs through cuDNN, by `jax.nn.dot_product_attention`.

It is FlashAttention-2 (Dao 2023, arXiv:2307.08691). It knows of padding after a text only, so texts are shifted to
their beginning and back, which takes that real tokens are in one run. What padding reads is zero.

Gradients are cuDNN's own, which run its forward pass again.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.models.config import Config


def mixed(
    config: Config,
    window: int | None,
    real: Bool[Array, "... pos"] | None,
    q: Float[Array, "*batch pos head d_head"],
    k: Float[Array, "*batch pos kv_head d_head"],
    v: Float[Array, "*batch pos kv_head d_head"],
    *,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "*batch pos head d_head"]:
    """Each head's mixture of values.

    Args:
        config: The model's.
        window: How many positions a query sees; None for all.
        real: Which tokens are real, in one run; None where all are.
        q: Queries.
        k: Keys.
        v: Values.
        implementation: Whose; "xla" computes the same on any device, and forms the pattern.
    """
    batch, n_pos = q.shape[:-3], q.shape[-3]
    q, k, v = (x.reshape(-1, *x.shape[-3:]) for x in (q, k, v))
    mix = partial(
        jax.nn.dot_product_attention, scale=config.attn_scale, is_causal=True, implementation=implementation,
        local_window_size=None if window is None else (window - 1, 0),
    )  # fmt: skip
    if real is None:
        z = mix(q, k, v)
    else:
        real = jnp.broadcast_to(real, (*batch, n_pos)).reshape(-1, n_pos)
        first, slots = jnp.argmax(real, -1)[:, None], jnp.arange(n_pos)
        shifted = lambda x, by: jnp.take_along_axis(x, ((slots + by) % n_pos)[..., None, None], 1)
        q, k, v = (shifted(x, first) for x in (q, k, v))
        lengths = real.sum(-1, dtype=jnp.int32)
        z = mix(q, k, v, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
        z = jnp.where(real[..., None, None], shifted(z, -first), 0)
    return z.reshape(*batch, *z.shape[1:])
