"""What stands for a call of a model, and which rows of what it gives are of real tokens.

mechjax's own models take prompts (tokens or packed documents, images of a `ViT`). Any other function, and an
encoder-decoder that is given both texts, take whatever they take: an array, a tuple of arguments or a mapping of named
ones. Which tokens are real is said by `Prompts` and by the arguments `attention_mask` and `decoder_attention_mask`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ArgumentError, NeedsDecoderError, SiteError
from mechjax.base.inputs import Inputs, inputs_of
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.interop.unmapped import Unmapped, unmapped
from mechjax.models.decoder import as_tokens
from mechjax.models.mamba import Mamba
from mechjax.models.patches import as_pixels
from mechjax.models.structures import Model
from mechjax.models.t5 import T5
from mechjax.models.vit import ViT
from mechjax.transform.static import unhold

Reader = Model | Unmapped
"""A model that prompts are given to, or a function that is called as it is."""

_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
"""Texts, and the arguments that say which of their tokens are real, as transformers names them."""


@runtime_checkable
class Packed(Protocol):
    """Prompts with positions of their own, such as `mechjax.text.pack` gives."""

    @property
    def prompts(self) -> Prompts:
        """Tokens and mask."""
        ...

    @property
    def positions(self) -> Int[Array, "batch pos"]:
        """Each token's position."""
        ...


@runtime_checkable
class Source(Protocol):
    """A stream of prompts that can say where it is, and go there."""

    def state(self) -> dict[str, Any]:
        """The place behind the last batch given, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> Any:
        """Go to the place of `state`."""
        ...


class Reading(NamedTuple):
    """What is run, on what.

    Attributes:
        model: What reads.
        prompts: The batches, from their start.
        first: The first of them, where what is run must be seen on one to be known; None where there is none.
    """

    model: Reader
    prompts: Iterable[Any]
    first: Any = None


def reading(model: Any, prompts: Iterable[Any]) -> Reading:
    """A model, or any function, with the batches that it is called on.

    Raises:
        NeedsDecoderError: Something that cannot be called.
    """
    if isinstance(model, Model) and not isinstance(model, T5):
        return Reading(model, prompts)
    if not callable(model):
        load = f"model, tokenizer = mj.load({model!r})" if isinstance(model, str) else "mj.load, mj.init"
        raise NeedsDecoderError(
            f"activations are those of a model or of any function with sites, and this is a {type(model).__name__}, "
            f"{model!r:.60}, which cannot be called. Load or make one: {load}, or mj.interop.from_torch."
        )
    prompts = (prompts,) if isinstance(prompts, Prompts | Mapping | Inputs) else prompts
    first, prompts = _peeked(prompts)
    if isinstance(model, T5) and not (type(first) is tuple or isinstance(first, Mapping | Inputs)):
        return Reading(model, prompts)
    return Reading(unmapped(model), prompts, first)


def _peeked(prompts: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first batch, and prompts that still begin with it."""
    if isinstance(prompts, Source):
        before = prompts.state()
        first = next(iter(prompts), None)
        prompts.restore(before)
        return first, prompts
    if not isinstance(prompts, Iterator):
        return next(iter(prompts), None), prompts
    first = next(prompts, None)
    return first, chain(() if first is None else (first,), prompts)


def said_model(model: Reader) -> Any:
    """The model as its user gave it."""
    return unhold(model.fn) if isinstance(model, Unmapped) else model


@dataclass(frozen=True)
class Batch:
    """One call.

    Attributes:
        given: What the model is called with.
        masks: True at real tokens, one mask for each text that has one.
        skip_first: Whether the first real token of each text (of an image, the class token) is left out.
        examples: How many examples there are, where that is known: of mechjax's own models.
        repeats: How many of them, at the end, stand in for examples that there are not.
    """

    given: Inputs
    masks: tuple[Bool[np.ndarray, "_ _"], ...]
    skip_first: bool
    examples: int | None = None
    repeats: int = 0

    def real(self, places: tuple[int, ...]) -> Bool[np.ndarray, "token"]:
        """Which rows are given, in their order, where a call gives so many: (batch, pos), or one for each example.

        Raises:
            SiteError: Padded texts, of which it is not known which rows they gave.
            ArgumentError: First tokens are left out where rows do not stand for tokens of texts.
        """
        places = (places[0] - self.repeats, *places[1:])
        fitting = [mask for mask in self.masks if mask.shape == places]
        if any((mask != fitting[0]).any() for mask in fitting[1:]):
            raise SiteError(
                f"both texts are (batch, pos) = {places} and are padded at different places, so it is not known which "
                "padding that of this site is. Pad one of them to another length."
            )
        padded = [str(mask.shape) for mask in self.masks if not mask.all() and mask.shape[:1] != places]
        if padded and not fitting:
            raise SiteError(
                f"the site has rows {places}, and padded texts are {', '.join(padded)}, so it is not known which rows "
                "are padding. Give prompts of one length, without padding."
            )
        real = fitting[0] if fitting else np.ones(places, bool)
        if self.skip_first:
            if len(places) != 2:
                raise ArgumentError(
                    f"skip_first=True leaves out the first token of each text, and this site has rows {places}, not "
                    "(batch, pos). Leave `skip_first` out."
                )
            real = real & (np.cumsum(real, -1) > 1)
        none = np.zeros((self.repeats, *places[1:]), bool)
        return np.concatenate([real, none]).reshape(-1)

    @property
    def texts(self) -> tuple[Int[Array, "_ _"], ...]:
        """The tokens of each text of the call."""
        found = [x.tokens if isinstance(x, Prompts) else x for x in self.given.args]
        for name, x in self.given.kwargs.items():
            found += [x.tokens] if isinstance(x, Prompts) else [x] if name in _MASKS else []
        return tuple(x for x in found if _is_of_texts(x))

    def shown(self, places: tuple[int, ...]) -> Int[Array, "text pos"]:
        """The tokens that rows stand for, where a call gives so many; the numbers of positions where it has no tokens.

        Raises:
            ArgumentError: Two texts, of which it is not known whose the rows are.
        """
        shape = (places[0], math.prod(places[1:]))
        texts = [x for x in self.texts if x.shape == places]
        if len(texts) > 1:
            raise ArgumentError(
                f"the call has {len(texts)} texts of shape {places}, so it is not known which of them this site reads. "
                "Pad one of them to another length, and give masks by name (`attention_mask`)."
            )
        numbers = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32), shape)
        return texts[0] if texts else numbers


def batch_of(model: Reader, prompts: Any, *, skip_first: bool) -> Batch:
    """Prompts as a call.

    Args:
        model: What is run.
        prompts: `Prompts`, ids, a batch of packed documents, or normalised images; of other functions what they take.
        skip_first: Whether the first real token of each text (of an image, the class token) is left out.

    Raises:
        TokenError, ShapeError: Prompts that the model cannot take.
        ArgumentError: Pixels that are integers, or packed documents for a model without positions.
    """
    if isinstance(model, Unmapped):
        given = inputs_of(prompts)
        return Batch(given, tuple(_masks(given)), skip_first)
    if isinstance(model, ViT):
        pixels = as_pixels(prompts, model.config, model.W_patch.dtype, any_size=False)
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
        return Batch(Inputs((pixels,), {}), (), skip_first, len(pixels))
    more: dict[str, Any] = {} if isinstance(model, Mamba) else {"positions": None}
    if isinstance(prompts, Packed):
        if isinstance(model, Mamba):
            raise ArgumentError(
                "Packed documents go by the positions of their tokens, and a Mamba has none: its states would run on "
                "from one document into the next. Give it padded prompts (`Prompts`)."
            )
        prompts, more = prompts.prompts, {"positions": prompts.positions}
    ids, mask = as_tokens(prompts, None, model.config)
    ids = ids.reshape(-1, ids.shape[-1])
    mask = None if mask is None else mask.reshape(ids.shape)
    masks = () if mask is None else (whole(mask),)
    return Batch(Inputs((ids,), {"mask": mask, **more}), masks, skip_first, len(ids))


def _masks(given: Inputs) -> Iterator[Bool[np.ndarray, "_ _"]]:
    """What a call says of which tokens are real; of a text beside a padded one also that all of it are."""
    values = (*given.args, *given.kwargs.values())
    if any(isinstance(text, Prompts) for text in values):
        for text in values:
            if isinstance(text, Prompts):
                yield whole(text.mask)
            elif _is_of_texts(text):
                yield np.ones(text.shape, bool)
    for of, name in _MASKS.items():
        said, text = given.kwargs.get(name), given.kwargs.get(of)
        if _is_of_texts(said):
            yield whole(said) != 0
        elif _is_of_texts(text):
            yield np.ones(text.shape, bool)


def _is_of_texts(x: Any) -> TypeGuard[Array]:
    return isinstance(x, jax.Array) and x.ndim == 2 and not jnp.issubdtype(x.dtype, jnp.inexact)


def filled(batch: Batch, examples: int | None) -> Batch:
    """A batch with repeats of its last example in the place of missing ones, which give no rows.

    So the last batch of a text, where it is smaller, needs no program of its own. Of functions whose examples are not
    known it comes back as it is.
    """
    if batch.examples is None or examples is None or batch.examples >= examples:
        return batch
    missing = examples - batch.examples
    longer = lambda x: jnp.concatenate([x, jnp.repeat(x[-1:], missing, axis=0)])
    return replace(batch, given=jax.tree.map(longer, batch.given), repeats=missing)
