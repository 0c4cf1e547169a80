"""Dictionaries of many layers: files in order, transcoders stacked, and one that writes across layers."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.cross_layer import CrossLayerTranscoder
from mechjax.dictionaries.formats.format import Place
from mechjax.dictionaries.formats.weights import wide


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


def cross_layer(layers: list[CrossLayer], what: str) -> CrossLayerTranscoder:
    """A cross-layer transcoder; without thresholds they are 0, which is ReLU.

    What training alone uses is not in files and gets a default.

    Raises:
        CheckpointError: Some layers skip and others do not.
    """
    stack = lambda arrays: jnp.asarray(np.stack(arrays))
    kept = wide(layers[0].W_enc.dtype)
    thresholds = [np.zeros_like(of.b_enc) if of.threshold is None else of.threshold for of in layers]
    skips = [of.W_skip for of in layers if of.W_skip is not None]
    if skips and len(skips) != len(layers):
        raise CheckpointError(
            f"{what} adds what {len(skips)} of {len(layers)} layers read; either all skip or none. Download it again."
        )
    return CrossLayerTranscoder(
        W_enc=stack([of.W_enc for of in layers]),
        b_enc=stack([of.b_enc for of in layers]),
        W_dec=jnp.asarray(np.concatenate([of.W_dec.swapaxes(0, 1) for of in layers])),
        b_dec=stack([of.b_dec for of in layers]),
        W_skip=stack(skips) if skips else None,
        threshold=stack(thresholds).astype(kept),
        bandwidth=jnp.asarray(1.0, kept),
        coefficient=jnp.asarray(1.0, layers[0].W_enc.dtype),
    )
