"""Which functions need mechjax's own decoder, and why: one table, one check, and the README's table of subjects.

Subjects of other libraries (`mechjax.interop`), and any function with sites, have activations that are captured, edited
and differentiated. Nothing is known of how these make the output: which of them is a residual stream, who writes to it,
or how to go on from the middle. A function that uses more says so by `@needs_decoder(reason)`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from mechjax.base.errors import NeedsDecoderError
from mechjax.models.decoder import Decoder
from mechjax.transform.transforms import Transformed

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Need:
    """What a function uses that a subject does not have.

    Attributes:
        why: What it uses.
        instead: What does something of the kind on any subject.
    """

    why: str
    instead: str


REASONS: dict[str, Need] = {
    "stream": Need(
        "it runs on from a residual stream between two layers, and a subject runs only as a whole",
        "`mj.intervene`, or `mj.patching.activation_patch`, which run all of it",
    ),
    "graph": Need(
        "it must know which parts write to the residual stream and which read it",
        "`mj.patching.activation_patch` or `mj.attribution.attribution_patch` of modules' outputs",
    ),
    "attention": Need(
        "it reads or cuts queries, keys and patterns of heads, which a subject's modules need not hand out",
        "`mj.capture`, `mj.zero` or `mj.replace` at whatever site of the subject holds them",
    ),
    "decompose": Need(
        "it takes the residual stream apart into what each component wrote",
        "`mj.capture` of modules' outputs, added up as the subject adds them",
    ),
    "weights": Need(
        "it reads or rewrites the decoder's weights by name",
        "the subject's own arrays, which are its leaves (`jax.tree.leaves(subject)`)",
    ),
    "transcoders": Need(
        "it follows latents through what reads and writes the residual stream",
        "`mj.attribution.attribution_patch` at the modules that the transcoders stand for",
    ),
    "tokens": Need(
        "it makes prompts of the decoder's vocabulary and context, and reads what each position predicts",
        "inputs and a metric of your own, with `mj.run`",
    ),
    "cache": Need(
        "it decodes with the decoder's cache of keys and values",
        "`mj.run(subject, ids, edits=..., capture=...)` in a loop over longer inputs, or the library's own generation",
    ),
}
"""The reasons."""


def needs_decoder(reason: str, *, also: Any = ()) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """A function whose `model` must be a decoder, which refuses any other by name.

    Args:
        reason: A key of `REASONS`; kept as the function's `needs`.
        also: Another class of mechjax's models, or several, that will do.
    """
    kinds = (Decoder, also)

    def of(fn: Callable[_P, _R]) -> Callable[_P, _R]:
        arguments = inspect.signature(fn).bind_partial

        @wraps(fn)
        def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            model = args[0] if args and isinstance(args[0], kinds) else None
            if model is None:
                given = arguments(*args, **kwargs).arguments
                model = given.get("model")
                if "model" in given and not isinstance(model, kinds):
                    raise NeedsDecoderError(_refusal(fn.__name__, model, REASONS[reason]))
            return fn(*args, **kwargs)

        checked.needs = reason  # type: ignore[attr-defined]
        return checked

    return of


def _refusal(name: str, model: Any, need: Need) -> str:
    kind = type(model).__name__.lstrip("_")
    if isinstance(model, str):
        return f"`{name}` takes a model, and got the text {model!r}: model, tokenizer = mj.load({model!r})."
    if isinstance(model, Transformed):
        return (
            f"`{name}` takes a model itself, and got one inside of `intervene` or `capture`. Pass the model; edits and "
            "captures go where the function takes them (`edits=`, `capture=`, `site=`)."
        )
    return (
        f"`{name}` needs mechjax's own decoder (`mj.load`, `mj.init`), and got a {kind}: {need.why}. Use instead "
        f"{need.instead}. The table of subjects in the README says what runs on any of them."
    )
