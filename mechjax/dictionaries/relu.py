"""ReLU dictionaries with a penalty on the size of their latents.

    f = ReLU((x - b_dec) W_enc + b_enc)        loss = ||y - y_hat||^2 + coefficient * sum_i f_i

Reference: Bricken et al. (2023), "Towards monosemanticity" (`penalty="l1"`: unit rows of the decoder); Anthropic (April
2024), "Update on how we train SAEs" (`penalty="weighted"`: `f_i |W_dec,i|`, rows of any length, which cannot shrink the
penalty by growing, and whose input is taken as it is). Misleads: the penalty makes latents smaller than what they stand
for, which gated and jump dictionaries do not suffer from.
"""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, drawn
from mechjax.dictionaries.products import Codes


class ReLU(Dictionary):
    """A ReLU dictionary.

    Attributes:
        coefficient: Of the penalty, for data of mean square 1.
        penalty: "l1" or "weighted" (static).
    """

    coefficient: Float[Array, "*many"]
    penalty: Literal["l1", "weighted"] = eqx.field(static=True, default="weighted")

    untrained: ClassVar[tuple[str, ...]] = ("coefficient",)

    @property
    def unit_norm(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rows of the decoder have length 1 where the penalty does not weight them."""
        return self.penalty == "l1"

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        n_features: int,
        key: Key[Array, ""] | Array,
        coefficient: float = 5.0,
        penalty: Literal["l1", "weighted"] = "weighted",
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "ReLU":
        """A fresh dictionary; rows of length 0.1 in both directions for "weighted", as in the April update.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            key: Draws the directions.
            coefficient: Of the penalty, for data of mean square 1; 5 is the April update's.
            penalty: "l1": sizes of latents, rows of the decoder of length 1; "weighted": times the rows' lengths.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters.

        Raises:
            ArgumentError: Sizes that are not positive.
        """
        arrays = drawn(d_model, n_features, key, d_out=d_out, skip=skip, dtype=dtype)
        if penalty == "weighted":
            arrays |= {"W_enc": 0.1 * arrays["W_enc"], "W_dec": 0.1 * arrays["W_dec"], "centred": False}
        return cls(**arrays, coefficient=jnp.asarray(coefficient, dtype), penalty=penalty)

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token."""
        return jax.nn.relu(self.preactivations(x))

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error and the penalty."""
        f = self.encode(x)
        weighted = f if self.penalty == "l1" else f * self.decoder_norms()
        sparsity = stage.sparsity * self.coefficient * weighted.sum(-1).mean()
        _, outcome = self.outcome(x, y, Codes(f), {"sparsity": sparsity})
        return outcome.squared_error + sparsity, outcome

    def scaled(self, read: Any, written: Any) -> "ReLU":
        """A dictionary of larger inputs and outputs; the coefficient grows as the latents do."""
        return eqx.tree_at(lambda d: d.coefficient, super().scaled(read, written), self.coefficient * written)
