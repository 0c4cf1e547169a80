"""AuxK: latents that have long been inactive learn to make what the others left over.

    e = y - y_hat, held fixed        e_hat = sum over the k_aux largest dead latents of f_i W_dec,i

    ||e - e_hat||^2 / ||e - mean e||^2

Without the decoder's bias, which is in `y_hat` already; gradients reach encoder and decoder of dead latents alone.

Reference: Gao et al. (2024), arXiv:2406.04093, appendix A.2.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mechjax.dictionaries.dictionary import Dictionary, Stage, squared
from mechjax.dictionaries.products import Codes, read, write


def aux_k(
    dictionary: Dictionary, x: Float[Array, "batch d_model"], error: Float[Array, "batch d_out"],
    dense: Float[Array, "batch feature"], stage: Stage, k: int,
) -> Float[Array, ""]:  # fmt: skip
    """The loss of dead latents; 0 where none is dead, or where nothing is left over."""
    left = lax.stop_gradient(error)

    def of_dead() -> Array:
        values, indices = lax.top_k(jnp.where(stage.dead, dense, -jnp.inf), min(k, dense.shape[-1]))
        seen, b = dictionary.readable(x)
        found = Codes(values, indices)
        found = found.holding(jax.nn.relu(read(seen, dictionary.W_enc, b, found)))
        spread = squared(left - left.mean(0))
        missed = squared(left - write(found, dictionary.W_dec))
        return jnp.where(spread > 0, missed / jnp.where(spread > 0, spread, 1), 0)

    return lax.cond(stage.dead.any(), of_dead, lambda: jnp.zeros((), error.dtype))
