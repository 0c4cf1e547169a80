"""Metrics of whole distributions."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.metrics.metric import Metric, position


class KL(Metric):
    """KL(reference || model) at a position, in nats."""

    reference: Float[Array, "... d_vocab"]

    def of(self, logits: Float[Array, "*batch token"]) -> Float[Array, "*batch"]:
        """Sum of p (log p - log q)."""
        p = jax.nn.log_softmax(self.reference.astype(jnp.float32), -1)
        q = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
        # Where p is zero its term is zero, whatever q is: 0 * -inf would be NaN.
        return jnp.where(jnp.isneginf(p), 0.0, jnp.exp(p) * (p - q)).sum(-1)

    def given(self) -> dict[str, tuple[int, ...]]:
        """One per example at most: position and reference."""
        return {**super().given(), "reference": self.reference.shape[:-1]}


def kl(reference: Any, pos: Any = -1) -> KL:
    """Divergence of a run from reference logits: KL(reference || run), in nats; 0 where they agree.

    Args:
        reference: Logits of the reference run at the position that is read, (*batch, d_vocab).
        pos: Position, one for all or one per example; negative counts from the end of the real tokens.
    """
    return KL(position(pos), jnp.asarray(reference))
