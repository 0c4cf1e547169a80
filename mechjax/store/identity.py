"""What tells a model and a tokenizer from others, as checksums that a manifest keeps."""

import dataclasses
import hashlib

from mechjax.hub import Tokenizer
from mechjax.models.structures import Model


def config_digest(model: Model) -> str:
    """A checksum of a model's choices that are not the default, so that a new choice leaves it as it was."""
    config = model.config
    choices = {
        field.name: repr(value)
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    return hashlib.sha256(repr((type(config).__name__, sorted(choices.items()))).encode()).hexdigest()


def tokenizer_digest(tokenizer: Tokenizer | None) -> str | None:
    """A checksum of a tokenizer."""
    return None if tokenizer is None else tokenizer.digest
