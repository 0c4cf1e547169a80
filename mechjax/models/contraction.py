"""Contractions at a stated precision."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from mechjax.models.model_config import ModelConfig
from mechjax.models.quantized import Weight, is_quantized


def contract(spec: str, x: Array, y: Weight, config: ModelConfig, dtype: DTypeLike | None = None) -> Array:
    """`einsum` of two arrays at the config's precision.

    A TPU's default for float32 is bfloat16 passes, a GPU's may be TF32; "highest" asks for float32. Products of
    narrower numbers are exact in float32 whatever the precision, so they are left to the device.

    Of a matrix in few bits, whole numbers are summed and the sum is scaled where all of it has one scale; else the
    matrix is made on the way into the product.
    """
    exact = config.precision == "highest" and x.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    if not is_quantized(y):
        return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=dtype)
    if (scale := y.outside(spec)) is None:
        return jnp.einsum(spec, x, y.full(), precision=precision, preferred_element_type=dtype)
    wide = jnp.float32 if jnp.finfo(x.dtype).bits < 32 else x.dtype  # sums of whole numbers are large
    sums = jnp.einsum(spec, x, y.numbers(y.dtype), precision=precision, preferred_element_type=wide)
    return (sums * scale.astype(wide)).astype(dtype or x.dtype)


def widened(x: Array) -> Array:
    """`x` in float32 at least, for what rounds once, at its end."""
    return x.astype(jnp.float32) if jnp.finfo(x.dtype).bits < 32 else x


def affine(x: Array, W: Weight, b: Array | None, config: ModelConfig, spec: str = "...i,io->...o") -> Array:
    """`contract`, and the bias, if any, added."""
    y = contract(spec, x, W, config)
    return y if b is None else y + b
