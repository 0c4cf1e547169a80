"""What a generation returns: tokens, how likely the model found them, and captured activations."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import TokenError
from mechjax.base.prompts import Prompts
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.hub.tokenizer import Tokenizer
from mechjax.transform.captured import Activations


class Generated(Record):
    """Generated tokens of each prompt.

    Attributes:
        tokens: Token ids; a row is filled up with the first stop id after its length. -1, and NaN from there on, where
            the model's logits were NaN. Shape (*batch, step).
        log_probs: The model's own log-probability of each token, whatever the temperature; 0 after a row's length, so
            that sums are right. In nats. Shape (*batch, step).
        lengths: Number of tokens of each row, the one that stopped it included. Shape (*batch).
        prompts: What was gone on with.
        stop: The token ids that end a row, or None.
        prompt_acts: Activations captured on the prompts, as a capture of the model gives them, but with the cache's
            slots as keys; or None.
        acts: Activations captured on the generated tokens that ran, that is all but the last: the same axes, where
            `pos` (or `query`) counts generated tokens. What stands after a row's length means nothing.
            Or None.
    """

    tokens: Int[Array, "*batch step"]
    log_probs: Float[Array, "*batch step"]
    lengths: Int[Array, "*batch"]
    prompts: Prompts
    stop: Int[Array, " stop"] | None
    prompt_acts: Activations | None
    acts: Activations | None

    @property
    def whole(self) -> Prompts:
        """The prompts with what was generated, masked: what the model takes."""
        real = jnp.arange(self.tokens.shape[-1]) < self.lengths[..., None]
        return Prompts(
            jnp.concatenate([self.prompts.tokens, jnp.where(real, self.tokens, 0)], -1),
            jnp.concatenate([self.prompts.mask, real], -1),
        )

    def text(self, tokenizer: Tokenizer) -> Any:
        """What was generated, without the token that stopped it: a text, or a list of them for a batch.

        Raises:
            TokenError: A row whose logits were NaN, so that no token was chosen.
        """
        tokens, ends = whole(self.tokens), whole(self.lengths)
        if (tokens < 0).any():
            row = np.argwhere(tokens < 0)[0].tolist()
            raise TokenError(
                f"No token was chosen at {row} (row, step): the model's logits there are NaN, so there is no text. "
                "Look at the weights, and for an edit that puts NaN or infinity."
            )
        if self.stop is not None:
            last = np.take_along_axis(tokens, ends[..., None] - 1, -1)
            ends = ends - np.isin(last, whole(self.stop))[..., 0]
        real = np.arange(tokens.shape[-1]) < ends[..., None]
        return tokenizer.decode(Prompts(jnp.asarray(tokens), jnp.asarray(real)))
