"""Dictionaries of dictionary_learning: `config.json`, which names the class, and `ae.pt`.

Conventions: latents are what the classes compute from the file. `AutoEncoder.from_pretrained` multiplies them by the
lengths of their rows of the decoder unless told not to; these are not. TopK stores a threshold that it does not use.
A BatchTopK whose threshold is -1 was trained for less than a thousand steps, and keeps whatever is positive, there
and here.

Reference: dictionary-learning 0.1.0, `dictionary.py`, `trainers/*.py`.
"""

import re
from typing import Any

import numpy as np

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.tensors import Settings, Tensors
from mechjax.dictionaries.formats.torch_file import read_state
from mechjax.dictionaries.formats.weights import Weights
from mechjax.hub.folder import inside

CONFIG, WEIGHTS = "config.json", "ae.pt"
KINDS = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)
_DIRECT = ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")  # matrices, where the others have linear layers
_BIAS = {
    "AutoEncoder": "bias",
    "AutoEncoderNew": "decoder.bias",
    "GatedAutoEncoder": "decoder_bias",
}  # else `b_dec`


def read_dictionary_learning(place: Place) -> Any:
    """The dictionary of a dictionary_learning folder.

    Raises:
        CheckpointError: Missing, truncated, hostile or inconsistent files.
        UnsupportedModelError: A class that mechjax does not have.
    """
    config = place.settings(CONFIG).inner("trainer")
    kind = config.needed("dict_class", config.text("dict_class"))
    config.refuse_unless("dict_class", kind, KINDS)
    state, what = read_state(inside(place.folder, WEIGHTS)), f"`{place.folder / WEIGHTS}`"
    sizes = {"activation_dim": config.whole("activation_dim"), "dict_size": config.whole("dict_size")}
    tensors = Tensors(what, state, dtype=place.dtype, **sizes)
    weights = _weights(kind, tensors)
    made = _dictionary(kind, weights, tensors, config)
    tensors.finish()
    return made


def _weights(kind: str, tensors: Tensors) -> Weights:
    b_dec = tensors.take(_BIAS.get(kind, "b_dec"), "activation_dim")
    if kind in _DIRECT:
        return Weights(
            W_enc=tensors.take("W_enc", "activation_dim", "dict_size"),
            b_enc=tensors.take("b_enc", "dict_size"),
            W_dec=tensors.take("W_dec", "dict_size", "activation_dim"),
            b_dec=b_dec,
            centred=kind != "JumpReluAutoEncoder",
        )
    return Weights(
        W_enc=tensors.take("encoder.weight", "dict_size", "activation_dim").T,
        b_enc=tensors.take("gate_bias" if kind == "GatedAutoEncoder" else "encoder.bias", "dict_size"),
        W_dec=tensors.take("decoder.weight", "activation_dim", "dict_size").T,
        b_dec=b_dec,
        centred=kind != "AutoEncoderNew",
    )


def _dictionary(kind: str, weights: Weights, tensors: Tensors, config: Settings) -> Any:
    if kind == "GatedAutoEncoder":
        return build.gated(weights, tensors.take("r_mag", "dict_size"), tensors.take("mag_bias", "dict_size"))
    if kind == "JumpReluAutoEncoder":
        return build.jump_relu(weights, tensors.take("threshold", "dict_size"))
    if kind in ("AutoEncoder", "AutoEncoderNew"):
        return build.relu(weights)
    k = int(tensors.number("k")) if "k" in tensors else config.needed("k", config.whole("k"))
    if (said := config.whole("k")) not in (None, k):
        raise CheckpointError(
            f"{config.what} has k={said}, {tensors.what} has k={k}: they do not belong together."
        )
    if kind == "AutoEncoderTopK":
        tensors.drop("threshold")
        return build.top_k(weights, k, tensors.what)
    threshold = float(tensors.number("threshold"))
    if kind == "BatchTopKSAE":
        return build.batch_top_k(weights, k, threshold, tensors.what)
    return build.matryoshka(weights, k, threshold, _prefixes(tensors), tensors.what)


def _prefixes(tensors: Tensors) -> tuple[int, ...]:
    """Where the groups of latents end."""
    sizes = tensors.whole_numbers("group_sizes")
    return tuple(int(n) for n in np.cumsum(sizes))


FORMAT = Format(
    "dictionary_learning",
    (re.escape(CONFIG), re.escape(WEIGHTS)),
    "dictionary_learning (dictionary-learning)",
    read_dictionary_learning,
)
