"""Gemma Scope 2: `params.safetensors` of JumpReLU dictionaries and transcoders for Gemma 3, and `config.json`.

A cross-layer transcoder is a folder of `params_layer_<i>.safetensors`, one file for each layer that is read; what it
writes to layers before is stored too, and must be 0.

Conventions: the input is not centred, and `affine_skip_connection` is (d_in, d_out): it is multiplied as `x W`.

Reference: Gemma Scope 2 (Google DeepMind, 2025), technical report and tutorial.
"""

from typing import Any

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.layers import CrossLayer, cross_layer, numbered_from_zero
from mechjax.dictionaries.formats.tensors import Tensors
from mechjax.dictionaries.formats.weights import Weights

CONFIG, WEIGHTS, LAYER = "config.json", "params.safetensors", r"params_layer_(\d{1,4})\.safetensors"


def read_gemma_scope_2(place: Place) -> Any:
    """The dictionary of a Gemma Scope 2 folder.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        UnsupportedModelError: An architecture that mechjax does not have.
    """
    _check(place, ("sae", "transcoder"))
    tensors = Tensors.of_safetensors(place.folder, WEIGHTS, dtype=place.dtype)
    weights = Weights(
        W_enc=tensors.take("w_enc", "d_in", "width"),
        b_enc=tensors.take("b_enc", "width"),
        W_dec=tensors.take("w_dec", "width", "d_out"),
        b_dec=tensors.take("b_dec", "d_out"),
        W_skip=tensors.take_if("affine_skip_connection", "d_in", "d_out"),
        centred=False,
    )
    threshold = tensors.take("threshold", "width")
    tensors.finish()
    return build.jump_relu(weights, threshold)


def read_gemma_scope_2_clt(place: Place) -> Any:
    """The cross-layer transcoder of a Gemma Scope 2 folder.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        UnsupportedModelError: An architecture that mechjax does not have.
    """
    return cross_layer(layers_of(place), f"`{place.folder}`")


def layers_of(place: Place) -> list[CrossLayer]:
    """Its parts, layer by layer."""
    _check(place, ("clt",))
    files = numbered_from_zero(place, LAYER)
    sizes: dict[str, int] = {"n_layers": len(files)}
    layers = []
    for i, name in files.items():
        tensors = Tensors.of_safetensors(place.folder, name, dtype=place.dtype, **sizes)
        W_dec = tensors.take("w_dec", "width", "n_layers", "d_model")
        if W_dec[:, :i].any():
            raise CheckpointError(f"{tensors.what} writes to layers before {i}, which it is of.")
        layers.append(
            CrossLayer(
                W_enc=tensors.take("w_enc", "d_model", "width"),
                b_enc=tensors.take("b_enc", "width"),
                W_dec=W_dec[:, i:],
                b_dec=tensors.take("b_dec", "d_model"),
                threshold=tensors.take("threshold", "width"),
                W_skip=tensors.take_if("affine_skip_connection", "d_model", "d_model"),
            )
        )
        tensors.finish()
        sizes = tensors.sizes
    return layers


def _check(place: Place, types: tuple[str, ...]) -> None:
    """Whether the config, where there is one, is of such a dictionary."""
    if not (place.folder / CONFIG).is_file():
        return
    config = place.settings(CONFIG)
    config.refuse_unless("architecture", config.text("architecture", "jump_relu"), ("jump_relu",))
    config.refuse_unless("type", config.text("type", types[0]), types)


FORMAT = Format("gemma_scope_2", (r"params\.safetensors",), "Gemma Scope 2", read_gemma_scope_2)
CLT = Format("gemma_scope_2_clt", (LAYER,), "Gemma Scope 2, cross-layer", read_gemma_scope_2_clt)
