"""Token batches with their mask: what a tokenizer returns and what every model and method takes."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mechjax.base.records import Record


class Prompts(Record):
    """A batch of tokenized prompts.

    Attributes:
        tokens: Token ids. Shape (*batch, pos).
        mask: True at real tokens, False at padding, wherever it stands. Shape (*batch, pos).
    """

    tokens: Int[Array, "*batch pos"]
    mask: Bool[Array, "*batch pos"]

    @property
    def lengths(self) -> Int[Array, "*batch"]:
        """Number of real tokens of each prompt."""
        return self.mask.sum(-1)

    def resolve(self, pos: Int[Array, "..."] | int) -> Int[Array, "*batch"]:
        """Index along `pos` of each prompt's `pos`-th real token; negative counts from its last real token.

        Out-of-range positions resolve to `n_pos`, which every consumer treats as out of range.
        """
        ordinal = jnp.cumsum(self.mask, -1) - 1
        wanted = jnp.where(jnp.asarray(pos) < 0, self.lengths + jnp.asarray(pos), jnp.asarray(pos))
        match = self.mask & (ordinal == wanted[..., None])
        return jnp.where(match.any(-1), match.argmax(-1), self.mask.shape[-1])
