"""What a generation asks of a structure: a run of the prompts, a run of one token, and what is kept between them."""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.prompts import Prompts
from mechjax.models.decoder import Tokens, as_tokens
from mechjax.transform.context import wanted

TAIL = ("ln_final.scale", "ln_final.normalized", "logits")
"""Sites of what comes after the last block, which have every position only where the vocabulary is formed at all."""


class Runs(eqx.Module):
    """The runs of one structure, of a model that it holds.

    Each gives logits of shape (*batch, d_vocab), then what `filled` takes.
    """

    @property
    def beside(self) -> tuple[Any, ...]:
        """What the run of the prompts takes beside them and the cache."""
        return ()

    @property
    @abc.abstractmethod
    def prefill(self) -> Callable[..., tuple[Any, ...]]:
        """The run of the prompts, `prefill(tokens, mask, cache, *beside)`, at each one's last real token."""

    @property
    @abc.abstractmethod
    def step(self) -> Callable[..., tuple[Any, ...]]:
        """The run of one generated token, `step(tokens, cache)`."""

    @abc.abstractmethod
    def empty(self, lead: tuple[int, ...], n_slots: int) -> Any:
        """The cache before the prompts, of tokens with the batch axes `lead`."""

    @abc.abstractmethod
    def filled(self, cache: Any, n_pos: int, mask: Array | None, given: Sequence[Any]) -> Any:
        """The cache after a run of `n_pos` tokens, which gave `given` after its logits."""

    @abc.abstractmethod
    def unfilled(self, cache: Any) -> tuple[Any, ...]:
        """What a step that does not run gives after its logits: what the cache holds already."""

    def check_room(self, counts: Int[Array, "*batch"], n_tokens: int) -> None:
        """Refuse `n_tokens` more than prompts of so many tokens each, where the model has no room for them."""

    def once(self, site: str) -> bool:
        """Whether a site has no part of a generated token: it runs with the prompts alone."""
        return False


def one_text(
    model: Any, prompts: Tokens, mask: Array | None, decoder_prompts: Tokens | None
) -> tuple[Int[Array, "*batch pos"], Bool[Array, "*batch pos"]]:
    """The tokens and mask of what a model of one text goes on with.

    Raises:
        ArgumentError: A second text.
    """
    if decoder_prompts is not None:
        raise ArgumentError(
            f"`decoder_prompts` are those of an encoder-decoder; a {type(model).__name__} goes on with `prompts`."
        )
    tokens, mask = as_tokens(prompts, mask, model.config)
    return tokens, jnp.ones(tokens.shape, bool) if mask is None else mask


def last_logits(
    unembed: Callable[[Array], Array], out: Float[Array, "*batch pos d_model"], tokens: Array, mask: Array
) -> Float[Array, "*batch d_vocab"]:
    """Logits at each prompt's last real token; the vocabulary is formed there alone, unless somebody reads the rest."""
    at = Prompts(tokens, mask).resolve(-1)[..., None, None]
    if any(map(wanted, TAIL)):
        logits = jnp.take_along_axis(unembed(out), at, -2, mode="fill")
    else:
        logits = unembed(jnp.take_along_axis(out, at, -2, mode="fill"))
    return logits[..., 0, :]
