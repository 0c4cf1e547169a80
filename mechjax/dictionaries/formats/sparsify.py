"""Dictionaries of EleutherAI's sparsify: `cfg.json` and `sae.safetensors`.

Conventions: the encoder is stored (feature, d_in), the decoder (feature, d_in), `W_skip` (d_out, d_in). The input is
centred unless `transcode` is set, and `W_skip` takes it as it is. TopK is chosen after ReLU, which is the same.

Reference: eai-sparsify 1.3.3, `sparse_coder.py`, `fused_encoder.py`.
"""

import re
from typing import Any

from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.tensors import Tensors
from mechjax.dictionaries.formats.weights import Weights

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


def read_sparsify(place: Place) -> Any:
    """The dictionary of a sparsify folder.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        UnsupportedModelError: An activation that mechjax does not have.
    """
    config = place.settings(CONFIG)
    config.refuse_unless("activation", config.text("activation", "topk"), ("topk",))
    config.refuse_unless(
        "signed", config.flag("signed", False), (False,)
    )  # of old files: top k by absolute value
    d_in = config.needed("d_in", config.whole("d_in"))
    expanded = d_in * (config.whole("expansion_factor") or 32)
    # 0 latents stand for as many as the factor says.
    n_latents = expanded if config.values.get("num_latents") == 0 else config.whole("num_latents") or expanded
    tensors = Tensors.of_safetensors(
        place.folder, WEIGHTS, dtype=place.dtype, d_in=d_in, num_latents=n_latents
    )
    skip = config.flag("skip_connection", False)
    weights = Weights(
        W_enc=tensors.take("encoder.weight", "num_latents", "d_in").T,
        b_enc=tensors.take("encoder.bias", "num_latents"),
        W_dec=tensors.take("W_dec", "num_latents", "d_in"),
        b_dec=tensors.take("b_dec", "d_in"),
        W_skip=tensors.take("W_skip", "d_in", "d_in").T if skip else None,
        centred=not config.flag("transcode", False),
    )
    tensors.finish()
    return build.top_k(weights, config.needed("k", config.whole("k")), config.what)


FORMAT = Format(
    "sparsify",
    (re.escape(CONFIG), re.escape(WEIGHTS)),
    "EleutherAI's sparsify (eai-sparsify)",
    read_sparsify,
)
