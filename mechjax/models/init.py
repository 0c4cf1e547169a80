"""A fresh decoder, initialised as GPT-2 (Radford et al. 2019, section 2.3)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.params import assemble

STD = 0.02


def init(config: Config, *, key: Key[Array, ""] | Array, dtype: Any = jnp.float32) -> Decoder:
    """A decoder with random weights.

    Matrices are normal with deviation 0.02, those that write to the residual stream divided by `sqrt(2 * n_layers)`;
    norms scale by 1, biases are 0.

    Args:
        config: Shape and choices.
        key: A PRNG key; the same key gives the same weights.
        dtype: Of all parameters.
    """

    def draw(path: str, shape: tuple[int, ...], key: Array) -> Array:
        name = path.rpartition(".")[2]
        if name == "w":
            return jnp.full(shape, 1 - config.norm_offset, dtype)
        if name in ("w_q", "w_kv"):
            return jnp.ones(shape, dtype)
        if name.startswith("b") or name == "sinks":
            return jnp.zeros(shape, dtype)
        std = STD / (2 * config.n_layers) ** 0.5 if name in ("W_O", "W_out") else STD
        return std * jax.random.normal(key, shape, dtype)

    keys = jax.random.split(key, len(config.shapes))
    return assemble(
        config,
        {path: draw(path, shape, k) for (path, shape), k in zip(config.shapes.items(), keys, strict=True)},
    )
