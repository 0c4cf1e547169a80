"""TopK dictionaries: of each token the k largest latents are kept.

    f = ReLU(TopK((x - b_dec) W_enc + b_enc))

    loss = FVU + multi * FVU with 4 k latents + aux * AuxK

where FVU is the squared error over the batch's variance. Sparsity needs no penalty, so latents do not shrink; but each
token has k latents whatever it holds (`BatchTopK` shares them out over the batch).

Reference: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", arXiv:2406.04093 (TopK 2.3, AuxK A.2,
MultiTopK appendix C, whose weight is 1/8).
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.aux_k import Revived, aux_of
from mechjax.dictionaries.dictionary import Outcome, Selected, Stage, drawn
from mechjax.dictionaries.largest import codes_of_each
from mechjax.dictionaries.products import Codes, read


class TopK(Revived):
    """A TopK dictionary.

    Attributes:
        multi: Weight of the loss with four times as many latents.
        k: Latents of a token (static).
        multi_k: Latents of the second loss; 0 for none (static).
    """

    multi: Float[Array, "*many"]
    k: int = eqx.field(static=True)
    multi_k: int = eqx.field(static=True)

    untrained: ClassVar[tuple[str, ...]] = ("aux", "multi")

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        n_features: int,
        k: int,
        key: Key[Array, ""] | Array,
        aux: float = 1 / 32,
        k_aux: int | None = None,
        multi: float = 0.0,
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "TopK":
        """A fresh dictionary: random unit directions, read and written alike.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            k: Latents of a token.
            key: Draws the directions.
            aux: Weight of AuxK; 0 for none.
            k_aux: Dead latents that it takes; None for half of `d_model`, as in the paper.
            multi: Weight of the loss with 4 k latents; the paper's is 1/8, 0 for none.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters.

        Raises:
            ArgumentError: Sizes that are not positive, or more latents of a token than there are.
        """
        arrays = drawn(d_model, n_features, key, d_out=d_out, skip=skip, dtype=dtype)
        check_k(k, n_features)
        return cls(
            **arrays,
            **aux_of(aux, k_aux, d_model, n_features, dtype),
            multi=jnp.asarray(multi, dtype),
            k=k,
            multi_k=min(4 * k, n_features) if multi else 0,
        )

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token: at most k are not 0."""
        z = self.preactivations(x)
        found = codes_of_each(z.reshape(-1, z.shape[-1]), self.k)
        return found.holding(jax.nn.relu(found.values)).dense(self.n_features).reshape(z.shape)

    def select(self, x: Float[Array, "batch d_model"], stage: Stage) -> Selected:
        """The k largest of each token, of the largest `multi_k` where these are asked for."""
        dense = lax.stop_gradient(self.preactivations(x))
        return Selected(codes_of_each(dense, max(self.k, self.multi_k)), dense)

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error, AuxK, and the error with more latents."""
        given = self.select(x, stage) if selected is None else selected
        seen, b = self.readable(x)
        every = given.codes.holding(jax.nn.relu(read(seen, self.W_enc, b, given.codes)))
        first = self._first(every)
        error, outcome = self.outcome(x, y, first, {})
        value = outcome.fvu
        if self.multi_k:
            part = self.multi * self.outcome(x, y, every, {})[1].fvu
            value, outcome = value + part, eqx.tree_at(lambda o: o.parts, outcome, {"multi": part})
        return self.with_aux(value, outcome, x, error, given.dense, stage)

    def _first(self, every: Codes) -> Codes:
        """Of the largest `multi_k` latents the largest k."""
        if not self.multi_k:
            return every
        if every.indices is None:
            return Codes(jnp.where(codes_of_each(every.values, self.k).values > 0, every.values, 0))
        return Codes(every.values[:, : self.k], every.indices[:, : self.k])


def check_k(k: int, n_features: int) -> None:
    """Whether a token can have `k` latents.

    Raises:
        ArgumentError: It cannot.
    """
    if not 1 <= k <= n_features:
        raise ArgumentError(
            f"k={k} of n_features={n_features}: a token has at least one latent and at most as many as there are."
        )
