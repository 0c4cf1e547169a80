"""A dictionary that reads each token normalised, and gives back what it makes in the token's own units.

    layer_norm:    u = (x - mean(x)) / (std(x) + 1e-5)        y = made * std(x) + mean(x)
    length:        u = x sqrt(d) / |x|                        y = made * |x| / sqrt(d)

with `std` over d - 1, and `made` what the dictionary makes of `u`. Where what is normalised is a constant, it is
folded into weights instead (`mechjax.dictionaries.formats`).

Reference: "layer_norm": Gao et al. (2024), arXiv:2406.04093, section 2.1 and the authors' code; both as in SAELens
(`layer_norm`, `constant_norm_rescale`), whose transcoders do not undo it: `restores=False`. As there, `W_skip` takes
the token as it is.
"""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary

EPSILON = 1e-5


class Normalized(eqx.Module):
    """A dictionary of normalised tokens.

    Attributes:
        dictionary: What reads them.
        kind: "layer_norm" or "length" (static).
        restores: Whether what is made is brought back to the token's units (static).
    """

    dictionary: Dictionary
    kind: Literal["layer_norm", "length"] = eqx.field(static=True)
    restores: bool = eqx.field(static=True, default=True)

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return self.dictionary.n_features

    @property
    def d_model(self) -> int:
        """Length of what is read."""
        return self.dictionary.d_model

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token."""
        mean, size = self._moments(x)
        spare = EPSILON if self.kind == "layer_norm" else 0
        return self.dictionary.encode((x - mean) / (size + spare))

    @on_any_mesh
    def decode(self, f: Float[Array, "*batch feature"]) -> Float[Array, "*batch d_out"]:
        """What latents stand for in normalised units; `completed` brings it back to those of a token."""
        return self.dictionary.decode(f)

    def completed(
        self, made: Float[Array, "*batch d_out"], x: Float[Array, "*batch d_model"]
    ) -> Float[Array, "*batch d_out"]:
        """`made` in the units of `x`, with what `W_skip` adds."""
        if self.restores:
            mean, size = self._moments(x)
            made = made * size + mean
        return self.dictionary.completed(made, x)

    @on_any_mesh
    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_out"]:
        """What is made of `x`."""
        return self.completed(self.decode(self.encode(x)), x)

    def _moments(self, x: Array) -> tuple[Array, Array]:
        """What is taken from each token, and what the rest is divided by."""
        if self.kind == "layer_norm":
            return x.mean(-1, keepdims=True), x.std(-1, keepdims=True, ddof=1)
        length = jnp.linalg.norm(x, axis=-1, keepdims=True) * x.shape[-1] ** -0.5
        return jnp.zeros_like(length), jnp.where(length > 0, length, 1)
