"""Which heads are of a known kind? Previous-token, duplicate-token and induction heads, by where they look."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.heads.duplicate_token import duplicate_token
from mechjax.heads.induction import induction
from mechjax.heads.previous_token import previous_token
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.needs import needs_decoder

_MEASURES = (previous_token, duplicate_token, induction)


class DetectedHeads(Record):
    """What each head scores as a head of each kind.

    Attributes:
        scores: From 0 to 1. Shape (kind, layer, head).
        kinds: The kinds, in the order of the first axis (static).
    """

    scores: Float[Array, "kind layer head"]
    kinds: tuple[str, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The kinds' names."""
        return {"kind": self.kinds}

    def heads(self, threshold: float = 0.4) -> dict[str, tuple[str, ...]]:
        """For each kind the names of the heads that score above a threshold, the highest first."""
        ranked = [(*label.split(".", 1), score) for label, score in self.top(self.scores.size)]
        return {
            kind: tuple(h for k, h, score in ranked if k == kind and score > threshold) for kind in self.kinds
        }


@needs_decoder("attention")
@on_any_mesh
def detect_heads(model: Decoder, prompts: Tokens) -> DetectedHeads:
    """Score every head as a previous-token, duplicate-token and induction head.

    The three scores are shares of attention, so a head is at most one of them entirely. Three passes over the prompts.

    Args:
        model: The decoder.
        prompts: Prompts or ids (*batch, pos); with `repeated_tokens` what is found is known by repetition alone.

    Raises:
        ArgumentError: Prompts in which no token occurs twice.
    """
    found = [measure(model, prompts) for measure in _MEASURES]
    return DetectedHeads(jnp.stack([f.scores for f in found]), tuple(f.kind for f in found))
