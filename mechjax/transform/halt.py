"""An error that only running shows, in values that cannot hold NaN.

A TPU cannot raise, nor ask the host of a pod while it runs (`equinox.error_if` would wait there for a key to be
pressed): programs for one say it by values that nothing else has.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool


def halt_if(x: Array, wrong: Bool[Array, ""], message: str) -> Array:
    """`x`; where `wrong`, an error, or on TPUs NaN, the dtype's largest integer (no token has such an id) or True.

    Args:
        x: What is returned.
        wrong: Whether it must not be.
        message: What the error says.
    """
    if not isinstance(wrong, Tracer):
        return eqx.error_if(x, wrong, message)
    marked: Any = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else True
    if jnp.issubdtype(x.dtype, jnp.integer):
        marked = jnp.iinfo(x.dtype).max
    return lax.platform_dependent(
        x,
        wrong,
        tpu=lambda x, wrong: jnp.where(wrong, jnp.asarray(marked, x.dtype), x),
        default=lambda x, wrong: eqx.error_if(x, wrong, message),
    )
