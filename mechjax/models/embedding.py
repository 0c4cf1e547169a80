"""Rows of a table by their ids: what tokens, positions and token types are embedded as."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rows(table: Float[Array, "row d_model"], ids: Int[Array, "..."]) -> Float[Array, "... d_model"]:
    """Rows of a table; NaN for ids that it does not have (`jnp.take` would wrap negative ones)."""
    return table.at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
