"""What tells a model and a tokenizer from others, as checksums that a manifest keeps."""

import dataclasses
import hashlib
from typing import Any

from mechjax.base.digests import arrays_digest
from mechjax.base.errors import ArgumentError
from mechjax.base.inputs import inputs_of
from mechjax.hub import Tokenizer
from mechjax.models.model_config import ModelConfig
from mechjax.store.calls import Reading, said_model
from mechjax.transform.digest import program_digest


def model_digests(read: Reading) -> dict[str, str]:
    """Checksums of what a model computes and of its weights, under their names in a manifest.

    Of mechjax's own models the first is that of their choices, of any other function that of its program on the first
    batch, as this JAX traces it.

    Raises:
        ArgumentError: A function of which no checksum says what it computes.
    """
    model = said_model(read.model)
    config = getattr(model, "config", None)
    computes = (
        config_digest(config) if isinstance(config, ModelConfig) else _function_digest(model, read.first)
    )
    return {"config": computes, "weights": arrays_digest(model)}


def config_digest(config: ModelConfig) -> str:
    """A checksum of a model's choices that are not the default, so that a new choice leaves it as it was."""
    choices = {
        field.name: repr(value)
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    return hashlib.sha256(repr((type(config).__name__, sorted(choices.items()))).encode()).hexdigest()


def _function_digest(fn: Any, first: Any) -> str:
    given = inputs_of(first)
    digest = program_digest(fn, *given.args, **given.kwargs)
    if digest is None:
        raise ArgumentError(
            "this function calls back into Python (`jax.pure_callback` or one of its kind), so that no checksum says "
            "what it computes and whether rows are its own. Write what it does there in JAX."
        )
    return digest


def tokenizer_digest(tokenizer: Tokenizer | None) -> str | None:
    """A checksum of a tokenizer."""
    return None if tokenizer is None else tokenizer.digest
