"""Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors` of JumpReLU dictionaries for Llama 3.1.

Conventions: training reads x sqrt(d) / norm_in and gives y sqrt(d) / norm_out, with the mean lengths of the data;
both are folded into weights, and latents are in training's units, as in SAELens. The one threshold is meant for
inference: there the authors' library divides latents by sqrt(d) / norm_in and, with `sparsity_include_decoder_norm`,
multiplies them by their rows of the decoder, and so does the comparison here. Where rows have length 1 and both ends
one length, that is SAELens' reading; where not, SAELens leaves it out.

Reference: He et al. (2024), arXiv:2410.20526; OpenMOSS/Language-Model-SAEs (2024), `sae.py`.
"""

from typing import Any

import numpy as np

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.tensors import Settings, Tensors
from mechjax.dictionaries.formats.weights import Weights

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"


def read_llama_scope(place: Place) -> Any:
    """The dictionary of a Llama Scope folder.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        UnsupportedModelError: An activation or a normalisation that mechjax does not have.
    """
    config = place.settings(CONFIG)
    config.refuse_unless("act_fn", config.text("act_fn"), ("jumprelu",))
    config.refuse_unless("norm_activation", config.text("norm_activation"), ("dataset-wise",))
    config.refuse_unless("use_glu_encoder", config.flag("use_glu_encoder", False), (False,))
    config.refuse_unless("use_decoder_bias", config.flag("use_decoder_bias", True), (True,))
    centred = config.needed(
        "apply_decoder_bias_to_pre_encoder", config.values.get("apply_decoder_bias_to_pre_encoder")
    )
    config.refuse_unless("apply_decoder_bias_to_pre_encoder", centred, (False,))
    d_model = config.needed("d_model", config.whole("d_model"))
    tensors = Tensors.of_safetensors(
        place.folder, WEIGHTS, dtype=place.dtype, d_model=d_model, d_sae=config.whole("d_sae")
    )
    weights = Weights(
        W_enc=tensors.take("encoder.weight", "d_sae", "d_model").T,
        b_enc=tensors.take("encoder.bias", "d_sae"),
        W_dec=tensors.take("decoder.weight", "d_model", "d_sae").T,
        b_dec=tensors.take("decoder.bias", "d_model"),
        centred=False,
    )
    tensors.finish()
    read, written = (d_model**0.5 / norm for norm in _norms(config))
    threshold = config.needed("jump_relu_threshold", config.number("jump_relu_threshold"))
    per_latent = np.full(len(weights.b_enc), threshold * read)
    if config.needed("sparsity_include_decoder_norm", config.values.get("sparsity_include_decoder_norm")):
        lengths = weights.lengths() * (read / written)
        if not (lengths > 0).all():
            raise CheckpointError(
                f"{tensors.what} has a row of zeros in its decoder, by which latents are measured."
            )
        per_latent = per_latent / lengths
    return build.jump_relu(weights.rescaled(read, written), per_latent)


def _norms(config: Settings) -> tuple[float, float]:
    """Mean lengths of what is read and written."""
    norms = config.inner("dataset_average_activation_norm")
    found = tuple(float(norms.needed(side, norms.number(side))) for side in ("in", "out"))
    if not all(np.isfinite(n) and n > 0 for n in found):
        raise CheckpointError(f"{norms.what} is {found}; two positive lengths were expected.")
    return found[0], found[1]


FORMAT = Format(
    "llama_scope",
    (r"hyperparams\.json", r"checkpoints"),
    "Llama Scope (Language-Model-SAEs)",
    read_llama_scope,
)
