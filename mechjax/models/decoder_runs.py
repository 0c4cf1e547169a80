"""What a generation runs of a decoder: its prompts once, which fill a cache, then one token at a time."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ShapeError
from mechjax.base.prompts import Prompts
from mechjax.models.cache import Cache
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.positions import check_growth
from mechjax.models.readout import readout
from mechjax.models.runs import TAIL, Runs, one_text
from mechjax.transform.context import wanted


class Prefill(eqx.Module):
    """The run of the prompts: the logits at each one's last real token, and the cache's keys and values."""

    model: Decoder

    def __call__(self, tokens: Array, mask: Array, cache: Cache) -> tuple[Array, Array, Array]:
        """Logits of shape (*batch, d_vocab), keys and values."""
        resid, cache = self.model.proceed(tokens, cache, mask=mask)
        at = Prompts(tokens, mask).resolve(-1)
        if any(map(wanted, TAIL)):  # else the vocabulary is formed at one position alone
            logits = self.model.unembed(resid)
            logits = jnp.take_along_axis(logits, at[..., None, None], -2, mode="fill")[..., 0, :]
        else:
            logits = readout(self.model, resid, at)
        return logits, cache.keys, cache.values


class Step(eqx.Module):
    """The run of one generated token."""

    model: Decoder

    def __call__(self, tokens: Array, cache: Cache) -> tuple[Array, Array, Array]:
        """Logits of shape (*batch, d_vocab), keys and values."""
        resid, cache = self.model.proceed(tokens[..., None], cache)
        return self.model.unembed(resid)[..., 0, :], cache.keys, cache.values


class CachedRuns(Runs):
    """Runs whose cache is of keys and values."""

    def filled(self, cache: Any, n_pos: int, mask: Array | None, given: Sequence[Array]) -> Any:
        """The cache after a run that gave its keys and values."""
        cache = cache.admit(n_pos, mask, None).advance(n_pos)
        return eqx.tree_at(lambda c: (c.keys, c.values), cache, tuple(given))

    def unfilled(self, cache: Cache) -> tuple[Array, Array]:
        """What a step that does not run gives: keys and values as they were."""
        return cache.keys, cache.values


class DecoderRuns(CachedRuns):
    """The runs of a decoder."""

    model: Decoder

    @property
    def prefill(self) -> Prefill:
        """The run of the prompts."""
        return Prefill(self.model)

    @property
    def step(self) -> Step:
        """The run of one generated token."""
        return Step(self.model)

    def empty(self, lead: tuple[int, ...], n_slots: int) -> Cache:
        """The cache before the prompts, of tokens with the batch axes `lead`."""
        return Cache.empty(self.model.config, lead, n_slots, self.model.W_E.dtype)

    def check_room(self, counts: Int[Array, "*batch"], n_tokens: int) -> None:
        """Refuse more tokens than the model has positions for.

        Raises:
            ShapeError: Such.
        """
        config, most = self.model.config, int(counts.max())
        longest = most + n_tokens - 1
        check_growth(config, counts, counts + (n_tokens - 1))
        if config.positions == "learned" and longest > config.n_ctx:
            raise ShapeError(
                f"Prompts of up to {most} tokens and {n_tokens} more, of which all but the last run, need "
                f"{longest} positions; the model has learned {config.n_ctx} (`n_ctx`). Generate fewer, or shorten the "
                "prompts."
            )


def decoder_runs(
    model: Decoder, prompts: Tokens, mask: Array | None, decoder_prompts: Tokens | None
) -> tuple[DecoderRuns, Int[Array, "*batch pos"], Bool[Array, "*batch pos"]]:
    """What is run of a decoder, and the tokens and mask that it goes on with.

    Raises:
        ArgumentError: A second text.
    """
    return DecoderRuns(model), *one_text(model, prompts, mask, decoder_prompts)
