"""BatchTopK dictionaries: of a batch of B tokens the B k largest latents are kept, however they fall to tokens.

    training: f = the B k largest of ReLU((x - b_dec) W_enc + b_enc)        loss = FVU + aux * AuxK
    use:      f = z where z > threshold

`threshold` is what the smallest kept latent of a batch is on average, so that a token's latents do not hang on what
stands beside it. It is the plain mean at first and an exponential one later: a short run leaves no wrong one behind.

Exactly B k are kept, ties by place (fewer where fewer are positive). The largest `SPARE` times k of each token are
looked through first; where a token may have more, all latents are.

Reference: Bussmann, Leask and Nanda (2024), arXiv:2412.06410.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mechjax.dictionaries.aux_k import aux_k
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, drawn
from mechjax.dictionaries.products import Codes, at_least_float32, few, pairs, read
from mechjax.dictionaries.top_k import check_k

SPARE = 4
RATE = 1e-3  # of the exponential mean: 1 - 0.999, as in the authors' and others' code


class BatchTopK(Dictionary):
    """A BatchTopK dictionary.

    Attributes:
        threshold: What a latent must be above in use.
        n_observed: Batches that it was estimated from.
        aux: Weight of AuxK.
        k: Latents of a token, on average over a batch (static).
        k_aux: Dead latents that AuxK takes; 0 for none (static).
    """

    threshold: Float[Array, "*many"]
    n_observed: Int[Array, "*many"]
    aux: Float[Array, "*many"]
    k: int = eqx.field(static=True)
    k_aux: int = eqx.field(static=True)

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
        dead = max(1, d_model // 2) if k_aux is None else k_aux
        return cls(
            **arrays,
            threshold=jnp.zeros((), at_least_float32(dtype)),
            n_observed=jnp.zeros((), jnp.int32),
            aux=jnp.asarray(aux, dtype),
            k=k,
            k_aux=min(dead, n_features) if aux else 0,
            **more,
        )

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
        values, indices = lax.top_k(dense, spare)
        kept = largest(values, len(x) * self.k)
        return Selected(pairs(values, indices, kept), dense, ~kept[:, -1].any())  # else a token may have more

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error, and AuxK."""
        given, kept = self.kept(x, stage, selected)
        error, outcome = self.outcome(x, y, kept, {}, least_of(kept))
        return self.with_aux(x, error, given, stage, outcome.fvu, outcome)

    def kept(self, x: Array, stage: Stage, selected: Selected | None) -> tuple[Selected, Codes]:
        """What was selected, and the same with gradients."""
        given = self.select(x, stage) if selected is None else selected
        found, (seen, b) = given.codes, self.readable(x)
        if found.indices is None:  # all latents
            found = Codes(jnp.where(largest(given.dense, len(x) * self.k), given.dense, -jnp.inf))
        return given, found.holding(jax.nn.relu(read(seen, self.W_enc, b, found)))

    def with_aux(
        self, x: Array, error: Array, given: Selected, stage: Stage, value: Array, outcome: Outcome
    ) -> tuple[Array, Outcome]:
        """The loss with AuxK."""
        if not self.k_aux:
            return value, outcome
        part = self.aux * aux_k(self, x, error, given.dense, stage, self.k_aux)
        return value + part, eqx.tree_at(lambda o: o.parts, outcome, outcome.parts | {"aux": part})

    def observed(self, outcome: Outcome) -> "BatchTopK":
        """With the threshold moved towards the batch's smallest activation, where the batch had any."""
        if outcome.least is None:
            return self
        there = jnp.isfinite(outcome.least)
        least = jnp.where(there, outcome.least, 0).astype(self.threshold.dtype)
        count = self.n_observed + there.astype(jnp.int32)
        rate = jnp.maximum(1 / jnp.maximum(count, 1).astype(least.dtype), RATE)
        moved = jnp.where(there, self.threshold + rate * (least - self.threshold), self.threshold)
        return eqx.tree_at(lambda d: [d.threshold, d.n_observed], self, [moved, count])

    def scaled(self, read: Any, written: Any) -> "BatchTopK":
        """A dictionary of larger inputs and outputs; the threshold grows as the latents do."""
        return eqx.tree_at(lambda d: d.threshold, super().scaled(read, written), self.threshold * written)


def largest(z: Float[Array, "batch n"], n: int) -> Bool[Array, "batch n"]:
    """Where the `n` largest positive numbers of a batch are, ties in order of rows and columns.

    Positive numbers are ordered as their bits are, so the n-th largest is found bit by bit, each by one count: no sort
    of everything, and on a mesh one sum of counts for each bit.
    """
    positive = jax.nn.relu(z)
    kind = jnp.uint32 if z.dtype.itemsize == 4 else jnp.uint16 if z.dtype.itemsize == 2 else jnp.uint64
    bits, width = lax.bitcast_convert_type(positive, kind), 8 * z.dtype.itemsize

    def narrow(i: Array, bound: Array) -> Array:
        higher = bound | (jnp.ones((), kind) << (width - 2 - i).astype(kind))
        return jnp.where((bits >= higher).sum(dtype=jnp.int32) >= n, higher, bound)

    bound = lax.fori_loop(0, width - 1, narrow, jnp.zeros((), kind))
    above, ties = bits > bound, bits == bound
    left = n - above.sum(dtype=jnp.int32)
    earlier = jnp.cumsum(ties.reshape(-1), dtype=jnp.int32).reshape(z.shape)
    return (above | (ties & (earlier <= left))) & (z > 0)


def least_of(kept: Codes) -> Float[Array, ""]:
    """The smallest activation; infinite where none is active."""
    return jnp.where(kept.values > 0, lax.stop_gradient(kept.values), jnp.inf).min()
