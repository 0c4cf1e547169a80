"""What a generation runs of T5: the encoder and the decoder's prompts once, then the decoder, one token at a time.

Keys and values of cross-attention are made once, of the encoder's output, and kept beside those of the decoder.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.models.cache import Cache
from mechjax.models.decoder import Tokens, as_tokens
from mechjax.models.decoder_runs import CachedRuns
from mechjax.models.runs import last_logits
from mechjax.models.t5 import T5, through_decoder
from mechjax.models.t5_block import KeysValues, Source

_ENCODED = ("cross_k", "cross_v")  # sites of the decoder that the encoder's tokens have


class T5Cache(Cache):
    """What attention keeps of the decoder's tokens so far, and cross-attention of the encoder's.

    Attributes, beside those of a cache:
        crossed: Keys and values of the encoder's tokens. Shapes (layer, *batch, source, head, d_head).
        source: Which of the encoder's tokens are real; None where all. Shape (*batch, source).
    """

    crossed: KeysValues
    source: Bool[Array, "*batch source"] | None


class T5Prefill(eqx.Module):
    """The run of the encoder and of the decoder's prompts."""

    model: T5

    def __call__(
        self, tokens: Array, mask: Array, cache: T5Cache, source: Array, source_mask: Array | None
    ) -> tuple[Array, ...]:
        """Logits of shape (*batch, d_vocab) at each prompt's last real token, keys and values, and those crossed."""
        given = Source(self.model.encoded(source, source_mask, None), source_mask)
        admitted = cache.admit(tokens.shape[-1], mask, None)
        out, after, crossed = through_decoder(self.model, tokens, given, cache=admitted, keeps=True)
        logits = last_logits(self.model.unembed, out, tokens, mask)
        return logits, after.keys, after.values, *(crossed or ())


class T5Step(eqx.Module):
    """The run of one generated token."""

    model: T5

    def __call__(self, tokens: Array, cache: T5Cache) -> tuple[Array, Array, Array]:
        """Logits of shape (*batch, d_vocab), keys and values."""
        given, admitted = Source(cache.crossed, cache.source), cache.admit(1, None, None)
        out, after, _ = through_decoder(self.model, tokens[..., None], given, cache=admitted)
        return self.model.unembed(out)[..., 0, :], after.keys, after.values


class T5Runs(CachedRuns):
    """The runs of an encoder-decoder, which takes texts of any length.

    Attributes:
        model: The model.
        source: The encoder's tokens and their mask.
    """

    model: T5
    source: tuple[Int[Array, "*batch source"], Bool[Array, "*batch source"] | None]

    @property
    def beside(self) -> tuple[Int[Array, "*batch source"], Bool[Array, "*batch source"] | None]:
        """What the run of the prompts takes beside them and the cache: the encoder's tokens and their mask."""
        return self.source

    @property
    def prefill(self) -> T5Prefill:
        """The run of the prompts."""
        return T5Prefill(self.model)

    @property
    def step(self) -> T5Step:
        """The run of one generated token."""
        return T5Step(self.model)

    def empty(self, lead: tuple[int, ...], n_slots: int) -> T5Cache:
        """The cache before the prompts, of tokens with the batch axes `lead`."""
        config, dtype = self.model.config, self.model.W_E.dtype
        ids, mask = self.source
        made = lambda n: jnp.zeros((config.n_decoder_layers, *lead, n, config.n_heads, config.d_head), dtype)
        crossed = made(ids.shape[-1]), made(ids.shape[-1])
        real, positions = jnp.zeros((*lead, n_slots), bool), jnp.zeros((*lead, n_slots), jnp.int32)
        return T5Cache(made(n_slots), made(n_slots), real, positions, jnp.int32(0), crossed, mask)

    def filled(self, cache: Any, n_pos: int, mask: Array | None, given: Sequence[Array]) -> Any:
        """The cache after a run that gave keys and values, and with the prompts those of cross-attention."""
        keys, values, *crossed = given
        cache = super().filled(cache, n_pos, mask, (keys, values))
        return eqx.tree_at(lambda c: c.crossed, cache, tuple(crossed)) if crossed else cache

    def once(self, site: str) -> bool:
        """Whether a site has no part of a generated token: it runs with the prompts alone."""
        return site.startswith("encoder.") or site in _ENCODED


def t5_runs(
    model: T5, prompts: Tokens, mask: Array | None, decoder_prompts: Tokens | None
) -> tuple[T5Runs, Int[Array, "*batch pos"], Bool[Array, "*batch pos"]]:
    """What is run of T5, and the tokens and mask that its decoder goes on with.

    Raises:
        ArgumentError: An encoder alone.
        ShapeError: Not one text of the decoder for each of the encoder.
    """
    if model.decoder is None:
        raise ArgumentError(
            "generate takes a decoder, and this T5 is an encoder alone (`n_decoder_layers` = 0)."
        )
    source = as_tokens(prompts, mask, model.config)
    lead = source[0].shape[:-1]
    if decoder_prompts is None:
        decoder_prompts = jnp.full((*lead, 1), model.config.start_token, jnp.int32)
    tokens, real = as_tokens(decoder_prompts, None, model.config)
    if tokens.shape[:-1] != lead:
        raise ShapeError(
            f"`decoder_prompts` has shape {tokens.shape}, and the encoder's text has the batch axes {lead}: they must "
            "be equal, one text of the decoder for each that the encoder reads."
        )
    return T5Runs(model, source), tokens, jnp.ones(tokens.shape, bool) if real is None else real
