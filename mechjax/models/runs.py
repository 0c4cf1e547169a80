"""What a generation runs of a decoder: its prompts once, which fill a cache, then one token at a time."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.prompts import Prompts
from mechjax.models.cache import Cache
from mechjax.models.decoder import Decoder
from mechjax.models.readout import readout
from mechjax.transform.context import wanted

_TAIL = ("ln_final.scale", "ln_final.normalized", "logits")


class Prefill(eqx.Module):
    """The run of the prompts: the logits at each one's last real token, and the cache's keys and values."""

    model: Decoder

    def __call__(self, tokens: Array, mask: Array, cache: Cache) -> tuple[Array, Array, Array]:
        """Logits of shape (*batch, d_vocab), keys and values."""
        resid, cache = self.model.proceed(tokens, cache, mask=mask)
        at = Prompts(tokens, mask).resolve(-1)
        if any(map(wanted, _TAIL)):  # else the vocabulary is formed at one position alone
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


class DecoderRuns(eqx.Module):
    """The runs of a decoder.

    Attributes:
        model: The decoder.
        beside: What the run of the prompts takes beside them and the cache; nothing.
    """

    model: Decoder
    beside: tuple[()] = ()

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

    def once(self, site: str) -> bool:
        """Whether a site has no part of a generated token: it runs with the prompts alone."""
        return False
