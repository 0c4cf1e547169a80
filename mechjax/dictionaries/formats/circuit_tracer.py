"""Transcoders of circuit-tracer, for each layer or across layers.

Files: `layer_<i>.safetensors`, or `W_enc_<i>.safetensors` and `W_dec_<i>.safetensors`; and `config.yaml`.

Conventions: encoders are (feature, d_model), and so are decoders; `W_skip` is (d_out, d_model). The second axis of
`W_dec_<i>` is the layer that is written to, from i on. What the library sets to 0 at the first position is the
caller's affair and not in the files.

Reference: circuit-tracer 0.5.0, `transcoder/single_layer_transcoder.py`, `transcoder/cross_layer_transcoder.py`.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mechjax.base.errors import ArgumentError, CheckpointError, UnsupportedModelError
from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.flat_yaml import read_flat_yaml
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.layers import CrossLayer, cross_layer, numbered_from_zero, stacked
from mechjax.dictionaries.formats.tensors import Tensors
from mechjax.dictionaries.formats.weights import Weights
from mechjax.hub.folder import inside

CONFIG, LAYER = "config.yaml", r"layer_(\d{1,4})\.safetensors"
ENCODER, DECODER = r"W_enc_(\d{1,4})\.safetensors", r"W_dec_(\d{1,4})\.safetensors"


def read_transcoders(place: Place) -> Any:
    """The transcoder of one layer, or of all, stacked along a first axis.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        ArgumentError: A layer that is not there.
    """
    _check(place, "transcoder_set")
    files, layer = place.numbered(LAYER), place.layer
    if place.file is not None:
        layer = next((i for i, name in files.items() if name == place.file), layer)
    if layer is not None:
        if layer not in files:
            raise ArgumentError(f"layer={layer}: `{place.folder}` has the layers {_span(files)}.")
        return _transcoder(place, files[layer])
    return stacked([_transcoder(place, name) for name in numbered_from_zero(place, LAYER).values()], place)


def _transcoder(place: Place, name: str) -> Any:
    tensors = Tensors.of_safetensors(place.folder, name, dtype=place.dtype)
    W_skip = tensors.take_if("W_skip", "d_model", "d_model")
    weights = Weights(
        W_enc=tensors.take("W_enc", "feature", "d_model").T,
        b_enc=tensors.take("b_enc", "feature"),
        W_dec=tensors.take("W_dec", "feature", "d_model"),
        b_dec=tensors.take("b_dec", "d_model"),
        W_skip=None if W_skip is None else W_skip.T,
        centred=False,
    )
    threshold = tensors.take_if("activation_function.threshold", "feature")
    tensors.finish()
    if threshold is None:
        return build.relu(weights)
    return build.jump_relu(weights, positive(threshold, tensors.what))


def read_cross_layer(place: Place) -> Any:
    """The cross-layer transcoder of a folder.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        UnsupportedModelError: Thresholds below 0.
    """
    return cross_layer(layers_of(place), f"`{place.folder}`")


def layers_of(place: Place) -> list[CrossLayer]:
    """Its parts, layer by layer."""
    _check(place, "cross_layer_transcoder")
    encoders, decoders = numbered_from_zero(place, ENCODER), numbered_from_zero(place, DECODER)
    n_layers = len(encoders)
    if len(decoders) != n_layers:
        raise CheckpointError(f"`{place.folder}` has {n_layers} encoders and {len(decoders)} decoders.")
    sizes: dict[str, int] = {}
    layers = []
    for i in range(n_layers):
        first = Tensors.of_safetensors(place.folder, encoders[i], dtype=place.dtype, **sizes)
        threshold = first.take_if(f"threshold_{i}", "feature")
        W_enc, b_enc = first.take(f"W_enc_{i}", "feature", "d_model").T, first.take(f"b_enc_{i}", "feature")
        b_dec = first.take(f"b_dec_{i}", "d_model")
        first.finish()
        sizes = first.sizes
        second = Tensors.of_safetensors(
            place.folder, decoders[i], dtype=place.dtype, **sizes, layers_from_here=n_layers - i
        )
        W_dec = second.take(f"W_dec_{i}", "feature", "layers_from_here", "d_model")
        second.finish()
        if threshold is not None:
            threshold = positive(threshold, first.what)
        layers.append(CrossLayer(W_enc, b_enc, W_dec, b_dec, threshold, None))
    return layers


def positive(threshold: np.ndarray, what: str) -> np.ndarray:
    """The thresholds, none of them below 0.

    Raises:
        UnsupportedModelError: One is: circuit-tracer would let negative latents through there.
    """
    if (threshold < 0).any():
        raise UnsupportedModelError(
            f"{what} has thresholds below 0, down to {threshold.min()}: circuit-tracer lets negative latents "
            "through there, and mechjax's JumpReLU has none."
        )
    return threshold


def _check(place: Place, kind: str) -> None:
    """Whether the config, where there is one, is of such transcoders, and their weights are here."""
    if not (place.folder / CONFIG).is_file():
        return
    config = read_flat_yaml(inside(place.folder, CONFIG))
    if config.get("model_kind", kind) != kind:
        raise CheckpointError(
            f"`{place.folder / CONFIG}` has model_kind={config['model_kind']!r}, but the files beside it are of a "
            f"{kind}."
        )


def elsewhere(folder: Path) -> list[str]:
    """Where the config says that weights lie, if not beside it; for reading, and never opened."""
    listed = read_flat_yaml(inside(folder, CONFIG)).get("transcoders", [])
    return [name[:200] for name in listed] if isinstance(listed, list) else []


def _span(files: dict[int, str]) -> str:
    return ", ".join(map(str, files)) if len(files) < 8 else f"{min(files)} to {max(files)}"


FORMAT = Format("circuit_tracer", (LAYER,), "circuit-tracer, one transcoder a layer", read_transcoders)
CLT = Format("circuit_tracer_clt", (ENCODER, DECODER), "circuit-tracer, cross-layer", read_cross_layer)
