"""p-annealed dictionaries: the penalty begins as L1 and ends near the number of active latents.

    loss = ||y - y_hat||^2 + coefficient * c_s * sum_i f_i^p_s        p_0 = 1, ..., p_S = 0.2

The run is cut into equal parts, each with its own p. Where p changes, c changes so that the penalty of that batch stays
what it was: c_s+1 = c_s * sum f^p_s / sum f^p_s+1. A small p punishes being active more than being large, so latents
shrink less than with L1.

Cost: that of a ReLU dictionary, and a power of each latent. Misleads when: sparsity is compared at one coefficient,
since what c becomes hangs on how latents are spread when p changes; choose coefficients by L0 at the end, or steer to a
target. The gradient grows without bound towards 0 (f^(p - 1)); at 0 itself it is 0.

Reference: Karvonen et al. (2024), "Measuring progress in dictionary learning for language model interpretability with
board game models", arXiv:2408.00113, section 4. Differs: c is found on the batch at which p changes, not on the last
ten before it.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries.dictionary import Outcome, Selected, Stage, drawn
from mechjax.dictionaries.products import Codes, at_least_float32
from mechjax.dictionaries.relu import ReLU


class PAnneal(ReLU):
    """A p-annealed dictionary; rows of the decoder have length 1.

    Attributes:
        p: The exponent of the last step.
        share: What the coefficient is multiplied by there (c).
        first: The exponent that a run begins with.
        last: The one that it ends with.
        parts: How many exponents a run has (static).
    """

    p: Float[Array, "*many"] = eqx.field(kw_only=True)
    share: Float[Array, "*many"] = eqx.field(kw_only=True)
    first: Float[Array, "*many"] = eqx.field(kw_only=True)
    last: Float[Array, "*many"] = eqx.field(kw_only=True)
    parts: int = eqx.field(static=True, kw_only=True)

    untrained: ClassVar[tuple[str, ...]] = ("coefficient", "p", "share", "first", "last")

    @classmethod
    def init(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        *,
        d_model: int,
        n_features: int,
        key: Key[Array, ""] | Array,
        coefficient: float = 1.0,
        first: float = 1.0,
        last: float = 0.2,
        parts: int = 10,
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "PAnneal":
        """A fresh dictionary: random unit directions, read and written alike.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            key: Draws the directions.
            coefficient: Of the penalty at the start, for data of mean square 1.
            first: The exponent that a run begins with.
            last: The one that it ends with.
            parts: How many exponents a run has.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters but exponents, which are float32 at least.

        Raises:
            ArgumentError: Sizes that are not positive, or exponents that do not fall within 0 to 1.
        """
        if not 0 < last <= first <= 1 or parts < 1:
            raise ArgumentError(
                f"first={first}, last={last}, parts={parts}: exponents fall from at most 1 to above 0, in one part or "
                "more."
            )
        arrays = drawn(d_model, n_features, key, d_out=d_out, skip=skip, dtype=dtype)
        wide = at_least_float32(dtype)
        start, end = jnp.asarray(first, wide), jnp.asarray(last, wide)
        return cls(
            **arrays, coefficient=jnp.asarray(coefficient, dtype), penalty="l1", p=start, share=jnp.ones((), wide),
            first=start, last=end, parts=parts,
        )  # fmt: skip

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error and the penalty."""
        f = self.encode(x)
        p, share = self.exponent(stage), self.share.astype(f.dtype)
        now = powers(f, p)
        held = lax.stop_gradient(f)
        before = lax.cond(p == self.p, lambda: lax.stop_gradient(now), lambda: powers(held, self.p))
        there = lax.stop_gradient(now)
        share = jnp.where(there > 0, share * before / jnp.where(there > 0, there, 1), share)
        sparsity = stage.sparsity * self.coefficient * share * now
        _, outcome = self.outcome(x, y, Codes(f), {"sparsity": sparsity})
        kept = jnp.stack([p.astype(jnp.float32), share.astype(jnp.float32)])
        outcome = eqx.tree_at(lambda o: o.held, outcome, kept, is_leaf=lambda z: z is None)
        return outcome.squared_error + sparsity, outcome

    def exponent(self, stage: Stage) -> Float[Array, ""]:
        """The exponent of a step."""
        part = jnp.clip(jnp.floor(stage.progress * self.parts), 0, self.parts - 1).astype(self.first.dtype)
        return self.first + (self.last - self.first) * (part / max(self.parts - 1, 1))

    def observed(self, outcome: Outcome) -> "PAnneal":
        """With the exponent and the share of the step that was done."""
        if outcome.held is None:
            return self
        held = outcome.held.astype(self.p.dtype)
        return eqx.tree_at(lambda d: [d.p, d.share], self, [held[0], held[1]])

    def scaled(self, read: Any, written: Any) -> "PAnneal":
        """A dictionary of larger inputs and outputs; parts of the loss keep their shares."""
        times = jnp.asarray(written, self.p.dtype)
        larger = super().scaled(read, written)
        coefficient = (self.coefficient * times ** (2 - self.p)).astype(self.coefficient.dtype)
        return eqx.tree_at(lambda d: d.coefficient, larger, coefficient)


def powers(f: Float[Array, "batch feature"], p: Float[Array, ""]) -> Float[Array, ""]:
    """The mean over tokens of the sum of `f ** p`, whose gradient at 0 is 0 and not infinite."""
    active = f > 0
    safe = jnp.where(active, f, 1)  # the power of what is not taken must have a finite gradient too
    return jnp.where(active, safe ** p.astype(f.dtype), 0).sum(-1).mean()
