"""Dictionaries of many layers: files in order, transcoders stacked, and one that writes across layers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import CheckpointError, UnsupportedModelError
from mechjax.dictionaries.formats.format import Place


@dataclass(frozen=True)
class CrossLayer:
    """The part of a cross-layer transcoder that reads one layer.

    Attributes:
        W_enc: Shape (d_model, feature).
        b_enc: Shape (feature,).
        W_dec: Shape (feature, layers from here on, d_model).
        b_dec: Of what is written to this layer. Shape (d_model,).
        threshold: Shape (feature,); None for ReLU.
        W_skip: Shape (d_model, d_model); None for none.
    """

    W_enc: np.ndarray
    b_enc: np.ndarray
    W_dec: np.ndarray
    b_dec: np.ndarray
    threshold: np.ndarray | None
    W_skip: np.ndarray | None


def numbered_from_zero(place: Place, pattern: str) -> dict[int, str]:
    """Files by number, none of which is missing.

    Raises:
        CheckpointError: One is, or there are none.
    """
    files = place.numbered(pattern)
    if not files:
        raise CheckpointError(f"`{place.folder}` has no files whose names match `{pattern}`.")
    if list(files) != list(range(len(files))):
        missing = next(i for i in range(len(files) + 1) if i not in files)
        raise CheckpointError(
            f"`{place.folder}` has {len(files)} layers but not layer {missing}. Download the folder again, or name one "
            "layer with `layer=` where layers stand for themselves."
        )
    return files


def stacked(dictionaries: list[Any], place: Place) -> Any:
    """One dictionary whose arrays have a first axis of layers.

    Raises:
        CheckpointError: They differ in kind or size.
    """
    first = jax.tree.map(jnp.shape, dictionaries[0])
    for i, other in enumerate(dictionaries):
        if jax.tree.structure(other) != jax.tree.structure(dictionaries[0]) or first != jax.tree.map(
            jnp.shape, other
        ):
            raise CheckpointError(
                f"Layer {i} of `{place.folder}` differs from layer 0 in kind or size, so they cannot be stacked. Load "
                "each with `layer=`."
            )
    return jax.tree.map(lambda *xs: jnp.stack(xs), *dictionaries)


def cross_layer(layers: list[CrossLayer], what: str) -> Any:
    """A cross-layer transcoder.

    Raises:
        UnsupportedModelError: There is none in mechjax yet.
    """
    raise UnsupportedModelError(
        f"{what} is a transcoder across {len(layers)} layers, which mechjax does not implement; it reads transcoders "
        "of one layer each."
    )
