"""AuxK: latents that have long been inactive learn to make what the others left over.

    e = y - y_hat, held fixed        e_hat = sum over the k_aux largest dead latents of f_i W_dec,i

    ||e - e_hat||^2 / ||e - mean e||^2

Without the decoder's bias, which is in `y_hat` already; gradients reach encoder and decoder of dead latents alone.

Reference: Gao et al. (2024), arXiv:2406.04093, appendix A.2.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mechjax.dictionaries.dictionary import Dictionary, Outcome, Stage, squared
from mechjax.dictionaries.largest import codes_of_each
from mechjax.dictionaries.products import read, write


class Revived(Dictionary):
    """Base of the kinds whose dead latents AuxK teaches.

    Attributes:
        aux: Weight of AuxK.
        k_aux: Dead latents that it takes; 0 for none (static).
    """

    aux: Float[Array, "*many"]
    k_aux: int = eqx.field(static=True)

    untrained: ClassVar[tuple[str, ...]] = ("aux",)

    @property
    def revives(self) -> bool:
        """Whether there is AuxK."""
        return self.k_aux > 0

    def revival(
        self, x: Float[Array, "batch d_model"], error: Float[Array, "batch d_out"],
        dense: Float[Array, "batch feature"], dead: Bool[Array, " feature"],
    ) -> Float[Array, ""]:  # fmt: skip
        """The loss of dead latents; 0 where none is dead, or where nothing is left over.

        Args:
            x: What is read.
            error: What the others left over.
            dense: What the encoder gives at every latent.
            dead: Which latents are dead.
        """
        left = lax.stop_gradient(error)
        found = codes_of_each(jnp.where(dead, dense, -jnp.inf), self.k_aux)
        seen, b = self.readable(x)
        found = found.holding(jax.nn.relu(read(seen, self.W_enc, b, found)))
        spread = squared(left - left.mean(0))
        missed = squared(left - write(found, self.W_dec))
        useful = (spread > 0) & dead.any()
        return self.aux * jnp.where(useful, missed / jnp.where(spread > 0, spread, 1), 0)

    def with_aux(
        self, value: Array, outcome: Outcome, x: Array, error: Array, dense: Array, stage: Stage
    ) -> tuple[Array, Outcome]:
        """The loss with AuxK; where it is not told which latents are dead, with what AuxK would be told."""
        if not self.k_aux:
            return value, outcome
        if stage.dead is None:
            return value, eqx.tree_at(lambda o: o.left, outcome, error, is_leaf=lambda x: x is None)
        part = self.revival(x, error, dense, stage.dead)
        return value + part, eqx.tree_at(lambda o: o.parts, outcome, outcome.parts | {"aux": part})


def aux_of(aux: float, k_aux: int | None, d_model: int, n_features: int, dtype: Any) -> dict[str, Any]:
    """What AuxK needs, half of `d_model` dead latents where their number is not given, as in the paper."""
    dead = max(1, d_model // 2) if k_aux is None else k_aux
    return {"aux": jnp.asarray(aux, dtype), "k_aux": min(dead, n_features) if aux else 0}
