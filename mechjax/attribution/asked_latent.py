"""What methods of one latent are asked for: at which position of each prompt, and through which head."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.models.decoder import Decoder
from mechjax.transform.select import is_concrete

Head = tuple[Any, Any]
"""A head: its layer and its number."""


def columns(
    pos: Any, ids: Int[Array, "batch n_pos"], mask: Bool[Array, "batch n_pos"] | None
) -> Int[Array, " batch"]:
    """A column of each prompt: as it is given, or counted from the last real token where it is negative.

    Raises:
        ShapeError: Neither one for all prompts nor one for each.
        ArgumentError: A column that there is not, or that is padding, where it can be seen.
    """
    (batch, n_pos), given = ids.shape, jnp.asarray(pos)
    if given.shape not in ((), (batch,)) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise ShapeError(
            f"pos= has shape {given.shape} and type {given.dtype}: give one position for all prompts, or one for each, "
            f"({batch},)."
        )
    real = jnp.ones(ids.shape, bool) if mask is None else mask
    end = Prompts(ids, real).resolve(-1).astype(jnp.int32) + 1
    at = jnp.where(given < 0, end + given.astype(jnp.int32), given.astype(jnp.int32))
    if is_concrete(at) and is_concrete(real):
        held, there = whole(at), whole(real)
        for example, column in enumerate(held):
            if not (0 <= column < n_pos and there[example, column]):
                asked = int(np.broadcast_to(np.asarray(given), (batch,))[example])
                why = (
                    f"there are {n_pos} columns" if not 0 <= column < n_pos else f"column {column} is padding"
                )
                raise ArgumentError(
                    f"pos= names position {asked} of example {example}, but {why}: positions count columns, padding "
                    "included, and negative ones from the last real token."
                )
    return at


def check_head(model: Decoder, head: Head, layer: Any) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """A head through which a latent of `layer` reads, by its layer and its number.

    Raises:
        ArgumentError: No such head, one that writes later, or something that names none.
        UnsupportedModelError: Values that are not linear in what heads are given.
    """
    check_values(model)
    if not isinstance(head, tuple) or len(head) != 2:
        raise ArgumentError(f"head={head!r}: a head is named by its layer and its number, such as (3, 1).")
    config = model.config
    for what, number, n in zip(("layer", "head"), head, (config.n_layers, config.n_heads), strict=True):
        if is_concrete(number) and not 0 <= int(number) < n:
            raise ArgumentError(
                f"head={head!r}: {what} {int(number)} is not there; there are {n}, 0 to {n - 1}."
            )
    n_attn = layer + 1 if config.residual == "serial" else layer
    if is_concrete(head[0]) and is_concrete(n_attn) and int(head[0]) >= int(n_attn):
        raise ArgumentError(
            f"head={head!r} writes after what latents of layer {int(layer)} read: they read what heads of the first "
            f"{int(n_attn)} layers write."
        )
    return jnp.asarray(head[0], jnp.int32), jnp.asarray(head[1], jnp.int32)


def check_values(model: Decoder) -> None:
    """Whether what heads move is linear in what they are given.

    Raises:
        UnsupportedModelError: It is not.
    """
    config = model.config
    if config.latent is None and config.qkv_clip is None:
        return
    found = (
        "latent attention, whose values come through a norm of their own"
        if config.latent is not None
        else f"values that are clipped at {config.qkv_clip}"
    )
    raise UnsupportedModelError(
        f"nothing can be traced through the heads of this model: it has {found}, which are not linear in what heads "
        "are given. feature_attribution takes latents apart into heads and sources, which stays exact."
    )
