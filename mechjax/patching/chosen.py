"""Which tokens of each prompt are meant: a mask, or places that may be counted from the end."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole


def chosen(
    what: str, given: Any, ids: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None
) -> Bool[Array, "batch pos"]:
    """The tokens as a mask.

    Args:
        what: Name of the argument, for messages.
        given: A mask (batch, pos); or indices along `pos`, one for all examples, one per example (batch,) or several
            (batch, k), as in `Pairs.positions`. Negative ones count from the last real token.
        ids: The prompts.
        mask: True for real tokens.

    Raises:
        ShapeError: Another shape.
        ArgumentError: An example without a token, a place that is not there, or one that is padding.
    """
    places = whole(given)
    real = np.ones(ids.shape, bool) if mask is None else whole(mask)
    if places.dtype == bool:
        if places.shape != ids.shape:
            raise ShapeError(
                f"{what}= is a mask of shape {places.shape}; the prompts have {ids.shape}: give one bool per token."
            )
        held = places
    elif np.issubdtype(places.dtype, np.integer):
        if places.ndim > 2 or (places.ndim and places.shape[0] != ids.shape[0]):
            raise ShapeError(
                f"{what}= has shape {places.shape} for {ids.shape[0]} prompts: give one index, one per prompt "
                f"({ids.shape[0]},), several ({ids.shape[0]}, k), or a mask {ids.shape}."
            )
        rows = np.broadcast_to(places, ids.shape[:1]) if places.ndim == 0 else places
        rows = rows[:, None] if rows.ndim == 1 else rows
        ends = whole(Prompts(ids, jnp.asarray(real)).resolve(-1))[:, None] + 1
        columns = np.where(rows < 0, rows + ends, rows)
        if wrong := [tuple(map(int, i)) for i in np.argwhere((columns < 0) | (columns >= ids.shape[1]))]:
            raise ArgumentError(
                f"{what}= names position {rows[wrong[0]]} of example {wrong[0][0]}, which has {ids.shape[1]} positions."
            )
        held = (columns[..., None] == np.arange(ids.shape[1])).any(1)
    else:
        raise ShapeError(f"{what}= must be a mask or integer positions; got {places.dtype}.")
    for example, row in enumerate(held):
        if not row.any():
            raise ArgumentError(f"{what}= marks no token of example {example}: mark at least one in each.")
        if (row & ~real[example]).any():
            at = int(np.flatnonzero(row & ~real[example])[0])
            raise ArgumentError(
                f"{what}= marks position {at} of example {example}, which is padding: positions count columns, padding "
                "included, as in `Pairs.positions`."
            )
    return jnp.asarray(held)
