"""BatchTopK dictionaries: of a batch of B tokens the B k largest latents are kept, however they fall to tokens.

    training: f = the B k largest of ReLU((x - b_dec) W_enc + b_enc)        loss = FVU + aux * AuxK
    use:      f = z where z > threshold

`threshold` is what the smallest kept latent of a batch is on average, so that a token's latents do not hang on what
stands beside it. The mean is of all batches up to ten, then of the last ten, of the last tenth of a longer run (Shamir
and Zhang 2013, arXiv:1212.1824), and of the last thousand of a long one: no early weights are left in it.

Exactly B k are kept, ties by place (fewer where fewer are positive). The largest `SPARE` times k of each token are
looked through first; where a token may have more, all latents are.

Reference: Bussmann, Leask and Nanda (2024), arXiv:2412.06410.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.aux_k import Revived, aux_of
from mechjax.dictionaries.dictionary import Outcome, Selected, Stage, drawn
from mechjax.dictionaries.largest import largest_of_all, largest_of_each
from mechjax.dictionaries.products import Codes, at_least_float32, few, pairs, read
from mechjax.dictionaries.top_k import check_k

SPARE = 4
RATE = 1e-3  # of the exponential mean: 1 - 0.999, as in the authors' and others' code
RECENT = 10  # batches that count at least, and one over the part that does


class BatchTopK(Revived):
    """A BatchTopK dictionary.

    Attributes:
        threshold: What a latent must be above in use.
        n_observed: Batches that it was estimated from.
        k: Latents of a token, on average over a batch (static).
    """

    threshold: Float[Array, "*many"]
    n_observed: Int[Array, "*many"]
    k: int = eqx.field(static=True)

    untrained: ClassVar[tuple[str, ...]] = ("threshold", "n_observed", "aux")

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
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
        **more: Any,
    ) -> "BatchTopK":
        """A fresh dictionary: random unit directions, read and written alike; the threshold is 0 until one is seen.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            k: Latents of a token, on average over a batch.
            key: Draws the directions.
            aux: Weight of AuxK; 0 for none.
            k_aux: Dead latents that it takes; None for half of `d_model`.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters but the threshold, which is float32 at least.
            **more: What a kind that is made of this one has besides.

        Raises:
            ArgumentError: Sizes that are not positive, or more latents of a token than there are.
        """
        arrays = drawn(d_model, n_features, key, d_out=d_out, skip=skip, dtype=dtype)
        check_k(k, n_features)
        return cls(
            **arrays,
            threshold=jnp.zeros((), at_least_float32(dtype)),
            n_observed=jnp.zeros((), jnp.int32),
            **aux_of(aux, k_aux, d_model, n_features, dtype),
            k=k,
            **more,
        )

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token that are above the threshold."""
        z = jax.nn.relu(self.preactivations(x))
        return jnp.where(z > self.threshold.astype(z.dtype), z, 0)

    def select(self, x: Float[Array, "batch d_model"], stage: Stage) -> Selected:
        """The B k largest of the batch."""
        dense = lax.stop_gradient(self.preactivations(x))
        spare = SPARE * self.k
        if not few(self.n_features, spare):
            return Selected(Codes(dense), dense)
        values, indices = largest_of_each(dense, spare)
        kept = largest_of_all(values, len(x) * self.k)
        return Selected(pairs(values, indices, kept), dense, ~kept[:, -1].any())  # else a token may have more

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error, and AuxK."""
        given, kept = self.kept(x, stage, selected)
        error, outcome = self.outcome(x, y, kept, {}, least_of(kept))
        return self.with_aux(outcome.fvu, outcome, x, error, given.dense, stage)

    def kept(self, x: Array, stage: Stage, selected: Selected | None) -> tuple[Selected, Codes]:
        """What was selected, and the same with gradients."""
        given = self.select(x, stage) if selected is None else selected
        found, (seen, b) = given.codes, self.readable(x)
        if found.indices is None:  # all latents
            found = Codes(jnp.where(largest_of_all(given.dense, len(x) * self.k), given.dense, -jnp.inf))
        return given, found.holding(jax.nn.relu(read(seen, self.W_enc, b, found)))

    def observed(self, outcome: Outcome) -> "BatchTopK":
        """With the threshold moved towards the batch's smallest activation, where the batch had any."""
        if outcome.least is None:
            return self
        there = jnp.isfinite(outcome.least)
        least = jnp.where(there, outcome.least, 0).astype(self.threshold.dtype)
        count = self.n_observed + there.astype(jnp.int32)
        seen = jnp.maximum(count, 1).astype(least.dtype)
        rate = jnp.maximum(1 / seen, jnp.clip(RECENT / seen, RATE, 1 / RECENT))
        moved = jnp.where(there, self.threshold + rate * (least - self.threshold), self.threshold)
        return eqx.tree_at(lambda d: [d.threshold, d.n_observed], self, [moved, count])

    def scaled(self, read: Any, written: Any) -> "BatchTopK":
        """A dictionary of larger inputs and outputs; the threshold grows as the latents do."""
        return eqx.tree_at(lambda d: d.threshold, super().scaled(read, written), self.threshold * written)


def least_of(kept: Codes) -> Float[Array, ""]:
    """The smallest activation; infinite where none is active."""
    return jnp.where(kept.values > 0, lax.stop_gradient(kept.values), jnp.inf).min()
