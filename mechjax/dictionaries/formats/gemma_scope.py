"""Gemma Scope: `params.npz` of JumpReLU dictionaries and transcoders for Gemma 2.

Conventions: the input is not centred. Those of attention read all heads' `z` side by side, before W_O; those of MLPs
what comes out of the norm behind it; transcoders read what its own norm gives, with the norm's weights folded into
the model. Those of embeddings read rows of the embedding as they are stored, before Gemma multiplies them by
sqrt(d_model): load them with `scale=d_model ** -0.5` for the stream of the model.

Reference: Lieberum et al. (2024), arXiv:2408.05147; the authors' tutorial.
"""

from typing import Any

from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.npz_file import read_npz
from mechjax.dictionaries.formats.tensors import Tensors
from mechjax.dictionaries.formats.weights import Weights
from mechjax.hub.folder import inside

WEIGHTS = "params.npz"


def read_gemma_scope(place: Place) -> Any:
    """The dictionary of a Gemma Scope folder.

    Raises:
        CheckpointError: Missing, truncated, hostile or inconsistent files.
    """
    found = read_npz(inside(place.folder, WEIGHTS))
    arrays = {"W_" + name[2:] if name.startswith("w_") else name: x for name, x in found.items()}
    tensors = Tensors(f"`{place.folder / WEIGHTS}`", arrays, dtype=place.dtype)
    weights = Weights(
        W_enc=tensors.take("W_enc", "d_in", "feature"),
        b_enc=tensors.take("b_enc", "feature"),
        W_dec=tensors.take("W_dec", "feature", "d_out"),
        b_dec=tensors.take("b_dec", "d_out"),
        centred=False,
    )
    threshold = tensors.take("threshold", "feature")
    tensors.finish()
    if place.scale is not None:
        weights = weights.rescaled(place.scale, place.scale)
    return build.jump_relu(weights, threshold)


FORMAT = Format("gemma_scope", (r"params\.npz",), "Gemma Scope", read_gemma_scope)
