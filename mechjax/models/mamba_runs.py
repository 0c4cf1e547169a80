"""What a generation runs of a Mamba: its prompts once, then one token at a time, from the states that these leave."""

from collections.abc import Sequence

import equinox as eqx
from jaxtyping import Array, Bool, Int

from mechjax.models.decoder import Tokens
from mechjax.models.mamba import Mamba
from mechjax.models.runs import Runs, last_logits, one_text
from mechjax.models.state_cache import StateCache


class MambaPrefill(eqx.Module):
    """The run of the prompts."""

    model: Mamba

    def __call__(self, tokens: Array, mask: Array, cache: StateCache) -> tuple[Array, StateCache]:
        """Logits of shape (*batch, d_vocab) at each prompt's last real token, and the cache."""
        resid, cache = self.model.proceed(tokens, cache, mask=mask)
        return last_logits(self.model.unembed, resid, tokens, mask), cache


class MambaStep(eqx.Module):
    """The run of one generated token."""

    model: Mamba

    def __call__(self, tokens: Array, cache: StateCache) -> tuple[Array, StateCache]:
        """Logits of shape (*batch, d_vocab), and the cache."""
        resid, cache = self.model.proceed(tokens[..., None], cache)
        return self.model.unembed(resid)[..., 0, :], cache


class MambaRuns(Runs):
    """The runs of a Mamba, whose cache is as large whatever the text's length."""

    model: Mamba

    @property
    def prefill(self) -> MambaPrefill:
        """The run of the prompts."""
        return MambaPrefill(self.model)

    @property
    def step(self) -> MambaStep:
        """The run of one generated token."""
        return MambaStep(self.model)

    def empty(self, lead: tuple[int, ...], n_slots: int) -> StateCache:
        """The cache before the prompts, of tokens with the batch axes `lead`."""
        return StateCache.empty(self.model.config, lead, self.model.W_E.dtype)

    def filled(
        self, cache: StateCache, n_pos: int, mask: Array | None, given: Sequence[StateCache]
    ) -> StateCache:
        """The cache after a run, which gave it."""
        return given[0]

    def unfilled(self, cache: StateCache) -> tuple[StateCache]:
        """What a step that does not run gives: the cache as it was."""
        return (cache,)


def mamba_runs(
    model: Mamba, prompts: Tokens, mask: Array | None, decoder_prompts: Tokens | None
) -> tuple[MambaRuns, Int[Array, "*batch pos"], Bool[Array, "*batch pos"]]:
    """What is run of a Mamba, and the tokens and mask that it goes on with.

    Raises:
        ArgumentError: A second text.
    """
    return MambaRuns(model), *one_text(model, prompts, mask, decoder_prompts)
