"""Where tokens stand: positions, who sees whom, rotation.

Positions count real tokens, so padding, wherever it stands, shifts nothing. Real tokens see real tokens and padding
sees padding: no row of attention is empty, so no NaN is born in padding, and none of it reaches a real position.

Rotation: Su et al. 2021, arXiv:2104.09864, Eq. 34; "halves" as in GPT-NeoX and Llama, "pairs" as in the paper.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.models.config import Config


class Sequence(eqx.Module):
    """What every layer needs to know of where the tokens stand. Without batch axes where all examples agree.

    Attributes:
        positions: Position of each token. Shape (*batch, pos).
        visible: Which key each query sees, windows aside. Shape (*batch, query, key).
        distance: How many real tokens back each key is. Shape (*batch, query, key); None where no layer has a window.
        rotation: Cosine and sine of the angles. Shapes (*batch, pos, rotary_dim / 2); None without rotation.
    """

    positions: Int[Array, "... pos"]
    visible: Bool[Array, "... query key"]
    distance: Int[Array, "... query key"] | None
    rotation: tuple[Float[Array, "... pos half"], Float[Array, "... pos half"]] | None


def count_positions(n_pos: int, mask: Bool[Array, "*batch pos"] | None) -> Int[Array, "*positions"]:
    """Index of each token among the real tokens of its example; 0 for padding before the first."""
    if mask is None:
        return jnp.arange(n_pos)
    return jnp.maximum(jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, 0)


def arrange(
    config: Config,
    n_pos: int,
    mask: Bool[Array, "*batch pos"] | None,
    positions: Int[Array, "*batch pos"] | None,
) -> Sequence:
    """Positions, visibility and rotation of `n_pos` tokens."""
    order = count_positions(n_pos, mask)
    positions = order if positions is None else positions
    visible = jnp.tri(n_pos, dtype=bool)
    if mask is not None:
        visible = visible & (mask[..., :, None] == mask[..., None, :])
    distance = None if config.windows is None else order[..., :, None] - order[..., None, :]
    rotation = angles(config, positions) if config.positions == "rotary" else None
    return Sequence(positions, visible, distance, rotation)


def angles(
    config: Config, positions: Int[Array, "*batch pos"]
) -> tuple[Float[Array, "*batch pos half"], Float[Array, "*batch pos half"]]:
    """Cosine and sine of `positions / base**(2i / rotary_dim)`, in float32."""
    exponent = jnp.arange(0, config.rotary_dim, 2, dtype=jnp.float32) / config.rotary_dim
    angle = positions[..., None].astype(jnp.float32) * (1.0 / config.rotary_base**exponent)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "*batch pos head d_head"],
    rotation: tuple[Float[Array, "*positions pos half"], Float[Array, "*positions pos half"]],
    config: Config,
) -> Float[Array, "*batch pos head d_head"]:
    """Rotate the first `rotary_dim` dimensions of each head."""
    cos, sin = (table[..., None, :].astype(x.dtype) for table in rotation)
    turning, still = x[..., : config.rotary_dim], x[..., config.rotary_dim :]
    if config.rotary_layout == "halves":
        first, second = jnp.split(turning, 2, -1)
    else:
        first, second = turning[..., ::2], turning[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if config.rotary_layout == "halves":
        return jnp.concatenate((*turned, still), -1)
    return jnp.concatenate((jnp.stack(turned, -1).reshape(turning.shape), still), -1)
