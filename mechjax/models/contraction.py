"""Contractions at a stated precision."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from mechjax.models.model_config import ModelConfig


def contract(spec: str, x: Array, y: Array, config: ModelConfig, dtype: DTypeLike | None = None) -> Array:
    """`einsum` of two arrays at the config's precision.

    A TPU's default for float32 is bfloat16 passes, a GPU's may be TF32; "highest" asks for float32. Products of
    narrower numbers are exact in float32 whatever the precision, so they are left to the device.
    """
    exact = config.precision == "highest" and x.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=dtype)


def widened(x: Array) -> Array:
    """`x` in float32 at least, for what rounds once, at its end."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x
