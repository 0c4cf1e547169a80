"""What tells a model and a tokenizer from others, as checksums that a manifest keeps."""

import dataclasses
import hashlib

import equinox as eqx
import jax
import numpy as np

from mechjax.hub import Tokenizer
from mechjax.models import Decoder, Encoder


def config_digest(model: Decoder | Encoder) -> str:
    """A checksum of a model's choices that are not the default, so that a new choice leaves it as it was."""
    config = model.config
    choices = {
        field.name: repr(value)
        for field in dataclasses.fields(config)
        if (value := getattr(config, field.name)) != field.default
    }
    return hashlib.sha256(repr((type(config).__name__, sorted(choices.items()))).encode()).hexdigest()


def weights_digest(model: Decoder | Encoder) -> str:
    """A checksum of a model's arrays, of their names, shapes and dtypes. One array at a time is on the host."""
    total = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_array))
    for path, leaf in leaves:
        array = np.ascontiguousarray(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        total.update(f"{name} {array.dtype} {array.shape};".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def tokenizer_digest(tokenizer: Tokenizer | None) -> str | None:
    """A checksum of a tokenizer."""
    return None if tokenizer is None else hashlib.sha256(tokenizer.backend.to_str().encode()).hexdigest()
