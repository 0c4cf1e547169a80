"""The three parts of attention: mixtures of values, their tangents, and their pullback; each of any way to mix.

Their operands are queries, keys and values, then what says where the tokens stand (`PLACES`, of which a part has some),
then what the part is linear in.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.models.config import Config
from mechjax.models.fused import fused
from mechjax.models.positions import Places

PLACES = {"real": 1, "order": 1, "window": 0}
"""What says where the tokens stand, and how many of its last axes are not batch."""
CORE = 3
"""How many those of all other operands are: (pos, head, d_head)."""

Part = Callable[..., list[Array]]


def mix(mixer: Callable[..., Array], q: Array, k: Array, v: Array) -> list[Array]:
    """Mixtures of values."""
    return [mixer(q, k, v)]


def tangent(mixer: Callable[..., Array], q: Array, k: Array, v: Array, *moved: Array) -> list[Array]:
    """How mixtures move with queries, keys and values."""
    return [jax.jvp(mixer, (q, k, v), moved)[1]]


def pullback(mixer: Callable[..., Array], q: Array, k: Array, v: Array, dz: Array) -> list[Array]:
    """Gradients of queries, keys and values, from that of mixtures."""
    return list(jax.vjp(mixer, q, k, v)[1](dz))


def split(has: tuple[str, ...], operands: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """A part's arrays of heads, and its places by name."""
    end = 3 + len(has)
    return [*operands[:3], *operands[end:]], dict(zip(has, operands[3:end], strict=True))


def without_kernels(config: Config, places: dict[str, Array], q: Array, k: Array, v: Array) -> Array:
    """The mixture in plain XLA."""
    at = Places(jnp.arange(q.shape[-3], dtype=jnp.int32), places.get("real"), places.get("order"))
    return fused(q, k, v, (at, at, places.get("window")), None, config)


def plainly(part: Part, config: Config, has: tuple[str, ...], *operands: Array) -> list[Array]:
    """A part in plain XLA."""
    values, places = split(has, operands)
    return part(partial(without_kernels, config, places), *values)
