"""Dictionaries of SAELens: `cfg.json` and `sae_weights.safetensors`, of version 6 and before, trained or in training.

Conventions: `apply_b_dec_to_input` says whether the input is centred (transcoders never are, and have no such
choice). Training checkpoints of BatchTopK and Matryoshka hold the threshold that their inference models have; where
latents are measured times their rows of the decoder (`rescale_acts_by_decoder_norm`), the lengths are folded in, as
SAELens does when it saves inference models. `hook_z` dictionaries read all heads of a token side by side, as one
vector: (head, d_head) in the order of rows. A constant scale is folded into weights where the file has it
(`activation_scaler.json`); SAELens itself looks it up in a table of releases, and leaves it out where there is none.

Reference: sae-lens 6.54.12, `saes/*.py`, `loading/pretrained_sae_loaders.py`.
"""

import re
from typing import Any, Literal

import numpy as np

from mechjax.base.errors import ArgumentError, CheckpointError, UnsupportedModelError
from mechjax.dictionaries.formats import weights as build
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.tensors import Settings, Tensors
from mechjax.dictionaries.formats.weights import Weights
from mechjax.dictionaries.normalized import Normalized

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KINDS = ("standard", "gated", "topk", "jumprelu", "batchtopk", "matryoshka_batchtopk", *TRANSCODERS)
NORMALISATIONS: dict[str, Literal["layer_norm", "length"]] = {
    "layer_norm": "layer_norm",
    "constant_norm_rescale": "length",
}
_AXES = {"W_enc": ("d_in", "d_sae"), "W_dec": ("d_sae", "d_out")}


def read_saelens(place: Place) -> Any:
    """The dictionary of a SAELens folder.

    Raises:
        CheckpointError: Missing, truncated or inconsistent files.
        UnsupportedModelError: An architecture or a normalisation that mechjax does not have.
    """
    config = _of_six(place.settings(CONFIG))
    kind = config.needed("architecture", config.text("architecture"))
    config.refuse_unless("architecture", kind, KINDS)
    d_in = config.whole("d_in")
    d_out = config.whole("d_out") if kind in TRANSCODERS else d_in
    tensors = Tensors.of_safetensors(
        place.folder, WEIGHTS, dtype=place.dtype, d_in=d_in, d_sae=config.whole("d_sae"), d_out=d_out
    )
    if "scaling_factor" in tensors and (tensors.take("scaling_factor", "d_sae") != 1).any():
        raise UnsupportedModelError(
            f"{tensors.what} has a `scaling_factor` that is not 1 everywhere, of fine-tuning in SAELens before 6; "
            "SAELens 6 does not load it either. Multiply rows of W_dec by it and remove it."
        )
    norm = config.text("normalize_activations", "none")
    config.refuse_unless(
        "reshape_activations", config.text("reshape_activations", "none"), ("none", "hook_z")
    )
    scale = _scale(place, config, norm)
    made = _dictionary(kind, config, tensors, scale)
    tensors.finish()
    if norm not in NORMALISATIONS:
        return made
    return Normalized(made, NORMALISATIONS[norm], restores=kind not in TRANSCODERS)


def _dictionary(kind: str, config: Settings, tensors: Tensors, scale: float | int | None) -> Any:
    """The dictionary itself, whose input is not normalised."""
    what = config.what
    biases = {"gated": "b_gate"}
    weights = Weights(
        W_enc=tensors.take("W_enc", *_AXES["W_enc"]),
        b_enc=tensors.take(biases.get(kind, "b_enc"), "d_sae"),
        W_dec=tensors.take("W_dec", *_AXES["W_dec"]),
        b_dec=tensors.take("b_dec", "d_out"),
        W_skip=tensors.take("W_skip", "d_out", "d_in").T if "skip" in kind else None,
        centred=kind not in TRANSCODERS and config.flag("apply_b_dec_to_input", True),
    )
    by_rows = "topk" in kind and config.flag("rescale_acts_by_decoder_norm", False)
    scale = 1.0 if scale is None else scale
    if scale != 1:
        weights = weights.rescaled(scale, scale)
    if by_rows:
        weights = weights.with_unit_rows(what)
    if kind == "gated":
        return build.gated(weights, tensors.take("r_mag", "d_sae"), tensors.take("b_mag", "d_sae"))
    if kind.startswith("jumprelu"):
        if "log_threshold" in tensors:
            return build.jump_relu(weights, np.exp(tensors.take("log_threshold", "d_sae")))
        return build.jump_relu(weights, tensors.take("threshold", "d_sae"))
    if kind == "topk":
        return build.top_k(weights, config.needed("k", config.whole("k")), what)
    if kind.endswith("batchtopk"):
        # Latents are measured by rows of the decoder, which the scale has just been taken out of.
        threshold = float(tensors.number("topk_threshold")) / (scale if by_rows else 1)
        k = config.needed("k", config.number("k"))
        if k != int(k):
            raise UnsupportedModelError(f"{what} keeps k={k} latents; mechjax keeps a whole number.")
        if kind == "batchtopk":
            return build.batch_top_k(weights, int(k), threshold, what)
        widths = config.values.get("matryoshka_widths")
        if not isinstance(widths, list) or any(type(n) is not int for n in widths):
            raise CheckpointError(f"{what} has matryoshka_widths={widths!r}; a list of sizes was expected.")
        return build.matryoshka(weights, int(k), threshold, tuple(widths), what)
    return build.relu(weights)


def _scale(place: Place, config: Settings, norm: str | None) -> float | int | None:
    """What the input is multiplied by, where that is a constant."""
    config.refuse_unless("normalize_activations", norm, ("none", *NORMALISATIONS, "expected_average_only_in"))
    if norm in NORMALISATIONS and place.scale is not None:
        raise ArgumentError(
            f"scale={place.scale}: {config.what} normalises each token ({norm}), so inputs have no scale. Leave it out."
        )
    if norm != "expected_average_only_in" or place.scale is not None:
        return place.scale
    if not (place.folder / SCALER).is_file():
        raise CheckpointError(
            f"{config.what} says that inputs are scaled to a mean length of sqrt(d_in), but not by how much: "
            f"`{SCALER}` is not there. Pass `scale=`, the `norm_scaling_factor` of SAELens' table of releases, or "
            "sqrt(d_in) over the mean length of the activations; `scale=1.0` if yours are scaled already."
        )
    scaler = place.settings(SCALER)
    if scaler.flag("has_whitening", False):
        raise UnsupportedModelError(f"{scaler.what} whitens inputs, which mechjax does not implement.")
    return scaler.needed("scaling_factor", scaler.number("scaling_factor"))


def _of_six(config: Settings) -> Settings:
    """The config as SAELens 6 would have written it."""
    said = (
        config.values.get("sae_lens_version")
        or config.inner("metadata").values.get("sae_lens_version")
        or "0"
    )
    major = re.match(r"\d+", str(said))
    if major is None:
        raise CheckpointError(
            f"{config.what} has sae_lens_version={str(said)[:40]!r}; a version was expected."
        )
    if int(major[0]) >= 6:
        return config
    values = dict(config.values)
    normalised = values.get("normalize_activations")
    values["normalize_activations"] = {True: "expected_average_only_in", False: "none", None: "none"}.get(
        normalised if isinstance(normalised, bool | None) else "", normalised
    )
    values.setdefault("architecture", "standard")
    activation = values.get("activation_fn_str", values.get("activation_fn", "relu"))
    old = Settings(config.what, values)
    old.refuse_unless("activation_fn", activation, ("relu", "topk"))
    if activation == "topk":
        values |= {"architecture": "topk", "k": old.inner("activation_fn_kwargs").whole("k")}
    return old


FORMAT = Format(
    "saelens",
    (re.escape(CONFIG), re.escape(WEIGHTS)),
    "SAELens (sae-lens)",
    read_saelens,
)
