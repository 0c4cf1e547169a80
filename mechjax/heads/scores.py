"""One score per head, and how the attention measures come by theirs."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.models.decoder import Decoder
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture


class HeadScores(Record):
    """A score of every head.

    Attributes:
        scores: The scores. Shape (layer, head).
        kind: What they measure (static).
    """

    scores: Float[Array, "layer head"]
    kind: str = eqx.field(static=True)

    def heads(self, threshold: float = 0.5) -> tuple[str, ...]:
        """Names of the heads that score above a threshold, the highest first."""
        return tuple(name for name, score in self.top(self.scores.size) if score > threshold)


class _Mass(eqx.Module):
    """Attention paid to targets: sum over keys, mean over the queries that have one, of one layer's pattern."""

    targets: Bool[Array, "*batch query key"]

    def __call__(self, pattern: Float[Array, "*batch head query key"], info: Any) -> Float[Array, " head"]:
        """The mean, in float32."""
        at = self.targets[..., None, :, :]
        paid = jnp.where(at, pattern.astype(jnp.float32), 0.0).sum(-1)
        over = tuple(axis for axis in range(paid.ndim) if axis != paid.ndim - 2)
        return paid.sum(over) / self.targets.any(-1).sum().astype(paid.dtype)


def attention_to(
    model: Decoder,
    targets: Bool[Array, "*batch query key"],
    tokens: Array,
    mask: Array | None,
    kind: str,
    lack: str,
) -> HeadScores:
    """How much of its attention each head pays to `targets`, over the queries that have any.

    Patterns are reduced as they arise: no more than one layer's is in memory.

    Raises:
        ArgumentError: No query has a target; `lack` says what that means of the prompts.
    """
    if is_concrete(targets) and not whole(targets).any():
        raise ArgumentError(
            f"{kind} heads cannot be told in these prompts: {lack}. `mechjax.heads.repeated_tokens` makes prompts in "
            "which every kind can."
        )
    return HeadScores(capture(model, "pattern", reduce=_Mass(targets))(tokens, mask=mask)[1]["pattern"], kind)
