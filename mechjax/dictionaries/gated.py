"""Gated dictionaries: whether a latent is active and how large it is are two questions.

    gate = (x - b_dec) W_enc + b_enc        size = ReLU(exp(r) * ((x - b_dec) W_enc) + b_size)

    f = size where gate > 0, else 0

    loss = ||y - y_hat||^2 + coefficient * sum_i ReLU(gate_i) + ||y - (ReLU(gate) W_dec + b_dec)||^2

In the last term the decoder is held fixed: it teaches the gate alone. The penalty falls on gates and not on sizes, so
latents do not shrink.

Reference: Rajamanoharan et al. (2024), "Improving dictionary learning with gated sparse autoencoders",
arXiv:2404.16014, Eq. 6 to 8.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, drawn, squared
from mechjax.dictionaries.products import Codes, product


class Gated(Dictionary):
    """A gated dictionary; `b_enc` is the gate's.

    Attributes:
        r: Logarithm of sizes over gates. Shape (feature,).
        b_size: Shape (feature,).
        coefficient: Of the penalty, for data of mean square 1.
    """

    r: Float[Array, "*many feature"]
    b_size: Float[Array, "*many feature"]
    coefficient: Float[Array, "*many"]

    untrained: ClassVar[tuple[str, ...]] = ("coefficient",)

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        n_features: int,
        key: Key[Array, ""] | Array,
        coefficient: float = 1.0,
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "Gated":
        """A fresh dictionary: random unit directions, read and written alike; sizes are gates.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            key: Draws the directions.
            coefficient: Of the penalty, for data of mean square 1.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters.

        Raises:
            ArgumentError: Sizes that are not positive.
        """
        arrays = drawn(d_model, n_features, key, d_out=d_out, skip=skip, dtype=dtype)
        none = jnp.zeros(n_features, dtype)
        return cls(**arrays, r=none, b_size=none, coefficient=jnp.asarray(coefficient, dtype))

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token."""
        return self._gates(x)[1]

    def _gates(self, x: Array) -> tuple[Array, Array]:
        """What gates are, and latents."""
        seen, b = self.readable(x)
        apart = product(seen, self.W_enc)
        gate = apart + b
        size = jax.nn.relu(jnp.exp(self.r) * (apart + (b - self.b_enc)) + self.b_size)
        return gate, jnp.where(gate > 0, size, 0)

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error, the penalty, and what the gates alone would make."""
        gate, f = self._gates(x)
        open_ = jax.nn.relu(gate)
        sparsity = stage.sparsity * self.coefficient * open_.sum(-1).mean()
        W, b, W_skip = lax.stop_gradient((self.W_dec, self.b_dec, self.W_skip))
        made = product(open_, W) + b
        made = made if W_skip is None else made + product(x, W_skip)
        parts = {"sparsity": sparsity, "gate": squared(y - made)}
        _, outcome = self.outcome(x, y, Codes(f), parts)
        return outcome.squared_error + parts["gate"] + sparsity, outcome

    def scaled(self, read: Any, written: Any) -> "Gated":
        """A dictionary of larger inputs and outputs."""
        larger = super().scaled(read, written)
        return eqx.tree_at(
            lambda d: [d.b_size, d.coefficient], larger, [self.b_size * written, self.coefficient * written]
        )
