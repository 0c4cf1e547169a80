"""A run whose backward pass leaves one layer out: gradients do not pass what that layer writes."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.models.config import Config
from mechjax.transform.edits import Edit, apply


@jax.custom_vjp
def _gated(x: Array, keep: Array) -> Array:
    return x


def _forward(x: Array, keep: Array) -> tuple[Array, Array]:
    return x, keep


def _backward(keep: Array, slope: Array) -> tuple[Array, Array]:
    return slope * keep, jnp.zeros_like(keep)


_gated.defvjp(_forward, _backward)  # a rule, so that a map over gates repeats the backward pass only


def _drop(x: Array, info: Any, keep: Array) -> Array:
    return _gated(x, keep[info.layer].astype(x.dtype))


def gates(keep: Float[Array, " layer"], config: Config) -> list[Edit]:
    """Edits that multiply the gradient at what each layer's attention and MLP write: 1 passes, 0 drops. Data."""
    written = ("attn_out", *("mlp_out",) * (config.mlp != "none"))
    return [apply(site, _drop, keep) for site in written]
