"""Autoencoders of OpenAI's sparse_autoencoder: one `.pt` file.

Conventions: latents are `activation(encoder(x - pre_bias) + latent_bias)`. Those with TopK read each token after
layer normalisation and give it back before; that is not in the file: the authors' reader goes by the activation, and
so does this one.

Reference: openai/sparse_autoencoder, `model.py` (commit 764586a); Gao et al. (2024), arXiv:2406.04093.
"""

from typing import Any

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.tensors import Settings, Tensors
from mechjax.dictionaries.formats.torch_file import read_state
from mechjax.dictionaries.formats.weights import Weights
from mechjax.dictionaries.normalized import Normalized
from mechjax.hub.folder import inside

STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def read_openai(place: Place) -> Any:
    """The autoencoder in a `.pt` file.

    Raises:
        CheckpointError: Missing, truncated, hostile or inconsistent files, or a folder with several.
        UnsupportedModelError: An activation that mechjax does not have.
    """
    there = sorted(path.name for path in place.folder.iterdir() if path.suffix == ".pt")
    if place.file is None and len(there) != 1:
        raise CheckpointError(f"`{place.folder}` holds {len(there)} .pt files; name the one to load.")
    name = place.file or there[0]
    state, what = read_state(inside(place.folder, name)), f"`{place.folder / name}`"
    config = Settings(what, state)
    activation = config.text("activation", "ReLU")
    config.refuse_unless("activation", activation, ("ReLU", "TopK"))
    more = config.inner("activation_state_dict")
    tensors = Tensors(what, state, dtype=place.dtype)
    tensors.drop("activation", "activation_state_dict", *STATISTICS)
    weights = Weights(
        W_enc=tensors.take("encoder.weight", "n_latents", "n_inputs").T,
        b_enc=tensors.take("latent_bias", "n_latents"),
        W_dec=tensors.take("decoder.weight", "n_inputs", "n_latents").T,
        b_dec=tensors.take("pre_bias", "n_inputs"),
    )
    tensors.finish()
    if activation == "ReLU":
        return build.relu(weights)
    more.refuse_unless("postact_fn", more.text("postact_fn", "ReLU"), ("ReLU",))
    return Normalized(build.top_k(weights, more.needed("k", more.whole("k")), what), "layer_norm")


FORMAT = Format(
    "openai",
    (r"(?!ae\.pt$).*\.pt",),
    "OpenAI's sparse_autoencoder",
    read_openai,
    lacks=(r"cfg\.json", r"config\.json", r".*\.safetensors"),
)
