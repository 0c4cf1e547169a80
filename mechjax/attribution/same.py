"""Where two runs have seen the same tokens: what they write there is the same, whatever rounding says."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.models.config import Config


def seen_apart(
    start: Float[Array, "batch pos d_model"], other: Float[Array, "batch pos d_model"], config: Config
) -> Bool[Array, "batch pos"]:
    """Positions that see a token which differs, from what enters the first block in either run."""
    differs = (start != other).any(-1)
    if config.causal:
        return jax.lax.cummax(differs.astype(jnp.int8), axis=1) > 0
    return jnp.broadcast_to(differs.any(1, keepdims=True), differs.shape)
