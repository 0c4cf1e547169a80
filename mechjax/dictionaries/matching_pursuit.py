"""Matching pursuit dictionaries: latents are found one after another, each in what those before left over.

    r = x - b_dec;  k times:    i = the largest r . W_dec,i        f_i += r . W_dec,i        r -= (r . W_dec,i) W_dec,i

    loss = FVU

Rows of the decoder have length 1 and are the encoder as well. What a latent takes is gone for those after it, so
latents that point the same way do not fire together, and a latent can be found that no single product of `x` would
show: of a hierarchy, the parent and then the child. A step that finds nothing positive adds nothing.

Gradients go through the products of the latents that were chosen and through what is left over, not through the choice.

Cost: 2 k d F operations a token to choose, k times as many as for a linear encoder, and about 12 k d for gradients.
Misleads when: the error is taken for the quality of the latents. It is the best of all kinds, since each
step fits what remains; features are found worst (SynthSAEBench, arXiv:2602.14687).

Reference: Costa, Fel, Lubana, Tolooshams and Ba (2025), "From flat to hierarchical: extracting sparse representations
with matching pursuit", arXiv:2506.03093; Mallat and Zhang (1993).
"""

from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mechjax.base.errors import ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, drawn
from mechjax.dictionaries.products import Codes, product
from mechjax.dictionaries.top_k import check_k


class MatchingPursuit(Dictionary):
    """A matching pursuit dictionary: `W_dec` and `b_dec` are all that it has.

    Attributes:
        k: Steps, and so latents of a token at most (static).
    """

    W_enc: None = eqx.field(default=None, kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    b_enc: None = eqx.field(default=None, kw_only=True)  # pyright: ignore[reportIncompatibleVariableOverride]
    k: int = eqx.field(static=True, kw_only=True)

    resamples: ClassVar[bool] = False

    @classmethod
    def init(
        cls, *, d_model: int, n_features: int, k: int, key: Key[Array, ""] | Array, dtype: Any = jnp.float32
    ) -> "MatchingPursuit":
        """A fresh dictionary: random unit directions.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            k: Latents of a token.
            key: Draws the directions.
            dtype: Of all parameters.

        Raises:
            ArgumentError: Sizes that are not positive, or more latents of a token than there are.
        """
        arrays = drawn(d_model, n_features, key, d_out=None, skip=False, dtype=dtype)
        check_k(k, n_features)
        return cls(W_dec=arrays["W_dec"], b_dec=arrays["b_dec"], k=k)

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return self.W_dec.shape[-2]

    @property
    def d_model(self) -> int:
        """Length of what is read."""
        return self.W_dec.shape[-1]

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token: at most k are not 0.

        Raises:
            ShapeError: An input of another length.
        """
        if x.shape[-1:] != (self.d_model,):
            raise ShapeError(
                f"the input has shape {x.shape}, and this dictionary reads vectors of length {self.d_model}: it was "
                "made for these."
            )
        flat = (x - self.b_dec).reshape(-1, self.d_model)
        values, indices = self.chosen(flat)
        return Codes(values, indices).dense(self.n_features).reshape(*x.shape[:-1], -1)

    def chosen(
        self, left: Float[Array, "batch d_model"]
    ) -> tuple[Float[Array, "batch k"], Int[Array, "batch k"]]:
        """What each step adds, and to which latent; one latent may be met twice."""

        def pursue(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
            products = product(left, self.W_dec.T)
            index = products.argmax(-1)
            value = jax.nn.relu(jnp.take_along_axis(products, index[:, None], -1))[:, 0]
            return left - value[:, None] * self.W_dec[index], (value, index)

        _, (values, indices) = lax.scan(pursue, left, None, self.k)
        return values.T, indices.T

    def select(self, x: Float[Array, "batch d_model"], stage: Stage) -> Selected:
        """The latents of each step."""
        values, indices = self.chosen(lax.stop_gradient(x - self.b_dec))
        found = Codes(values, indices)
        return Selected(found, found.dense(self.n_features))

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error: of an autoencoder, what the last step leaves over."""
        given = self.select(x, stage) if selected is None else selected
        left = pursued(x - self.b_dec, self.W_dec, given.codes)
        _, outcome = self.measured(y - (x - left), y, Codes(given.dense), {})
        return outcome.fvu, outcome

    def scaled(self, read: Any, written: Any) -> "MatchingPursuit":
        """A dictionary of larger inputs and outputs, which are one: latents grow as these do."""
        return eqx.tree_at(lambda d: d.b_dec, self, self.b_dec * jnp.asarray(written, self.b_dec.dtype))


def pursued(
    left: Float[Array, "batch d_model"], W: Float[Array, "feature d_model"], found: Codes
) -> Float[Array, "batch d_model"]:
    """What steps with these latents leave over, column by column."""
    indices: Any = found.indices

    @partial(jax.checkpoint, prevent_cse=False)
    def step(left: Array, index: Array) -> tuple[Array, None]:
        rows = W[index]
        value = jax.nn.relu((left * rows).sum(-1, keepdims=True))
        return left - value * rows, None

    return lax.scan(step, left, indices.T)[0]
