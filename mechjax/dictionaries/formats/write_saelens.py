"""A dictionary as a SAELens folder, which `sae_lens.SAE.load_from_disk` opens and which computes the same there.

What SAELens' inference models have no word for becomes what they have: BatchTopK and Matryoshka are JumpReLU with one
threshold, as SAELens itself saves them; the input of a transcoder is not centred there, so the bias goes into
`b_enc`. Thresholds are written in the dtype of weights, which is the one that SAELens computes in.

Reference: sae-lens 6.54.12, `SAE.save_model` and the configs in `saes/*.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from mechjax.base.atomic import replace_folder
from mechjax.base.errors import ArgumentError, UnsupportedModelError, WriteError
from mechjax.base.provenance import Provenance, provenance_of
from mechjax.dictionaries.batch_top_k import BatchTopK
from mechjax.dictionaries.dictionary import Dictionary
from mechjax.dictionaries.formats.saelens import CONFIG, NORMALISATIONS, WEIGHTS
from mechjax.dictionaries.gated import Gated
from mechjax.dictionaries.jump_relu import JumpReLU
from mechjax.dictionaries.normalized import Normalized
from mechjax.dictionaries.products import product
from mechjax.dictionaries.relu import ReLU
from mechjax.dictionaries.top_k import TopK
from mechjax.hub.listing import list_files

VERSION = "6.54.12"  # of the layout: SAELens reads configs of other major versions otherwise


def write_saelens(
    dictionary: Dictionary | Normalized,
    folder: Path | str,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    hook_name_out: str | None = None,
    **made_from: Any,
) -> Path:
    """Write `cfg.json` and `sae_weights.safetensors`, and `mechjax.json` with their checksums and where they come from.

    The folder appears whole or not at all: it is written beside its place and then renamed.

    Args:
        dictionary: What to write; `Normalized` as SAELens' `normalize_activations`.
        folder: Where to; it must not exist, or be empty.
        model_name: Of the model, as SAELens calls it, such as `"gpt2-small"`.
        hook_name: Where its input is, as TransformerLens calls it, such as `"blocks.8.hook_resid_pre"`.
        hook_name_out: Where its output is, for a transcoder.
        **made_from: What it was made from, as `mj.save` takes it, such as `seed=0`.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: A kind that SAELens does not have.
        ArgumentError: Several dictionaries in one, or what it was made from cannot be told.
        WriteError: The folder exists and is not empty, or cannot be written.
    """
    inner, normalised = dictionary.dictionary if isinstance(dictionary, Normalized) else dictionary, "none"
    if isinstance(dictionary, Normalized):
        normalised = next(theirs for theirs, ours in NORMALISATIONS.items() if ours == dictionary.kind)
    _check_one(inner)
    # What is not brought back is no autoencoder, whatever its sizes.
    kind, arrays, config = _described(inner, isinstance(dictionary, Normalized) and not dictionary.restores)
    if isinstance(dictionary, Normalized) and dictionary.restores and kind.endswith("transcoder"):
        raise UnsupportedModelError(
            "SAELens does not bring what a transcoder makes of normalised inputs back to their units; this one does."
        )
    metadata = {"sae_lens_version": VERSION, "sae_lens_training_version": None, "model_name": model_name,
                "hook_name": hook_name, "hook_name_out": hook_name_out}  # fmt: skip
    config |= {
        "architecture": kind, "dtype": inner.W_enc.dtype.name, "device": "cpu", "normalize_activations": normalised,
        "reshape_activations": "none", "metadata": {k: v for k, v in metadata.items() if v is not None},
    }  # fmt: skip
    return _write(Path(folder), config, arrays, provenance_of(dictionary=dictionary, **made_from))


def _check_one(dictionary: Dictionary) -> None:
    """Whether this is one dictionary, of a kind that can be written.

    Raises:
        UnsupportedModelError: A kind that SAELens does not have.
        ArgumentError: Its arrays have a first axis of several.
    """
    _kind(dictionary, across=False)
    if dictionary.W_enc.ndim != 2:
        raise ArgumentError(
            f"this holds {dictionary.W_enc.shape[:-2]} dictionaries; SAELens' folders hold one each. Write them one by "
            "one: `jax.tree.map(lambda x: x[i], dictionary)`."
        )


def _described(d: Dictionary, transcodes: bool) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """SAELens' name of the kind, its tensors, and what its config says of it."""
    arrays: dict[str, Any] = {"W_enc": d.W_enc, "b_enc": d.b_enc, "W_dec": d.W_dec, "b_dec": d.b_dec}
    config: dict[str, Any] = {"d_in": d.d_model, "d_sae": d.n_features}
    across = transcodes or d.W_skip is not None or d.W_dec.shape[-1] != d.d_model
    kind = _kind(d, across)
    if isinstance(d, JumpReLU | BatchTopK):
        arrays["threshold"] = jnp.broadcast_to(d.threshold, d.b_enc.shape).astype(d.b_enc.dtype)
    elif isinstance(d, Gated):
        arrays |= {"b_gate": arrays.pop("b_enc"), "b_mag": d.b_size, "r_mag": d.r}
    elif isinstance(d, TopK):
        config["k"] = d.k
    if not across:
        return kind, arrays, config | {"apply_b_dec_to_input": d.centred}
    if d.centred:
        arrays["b_enc"] = d.b_enc - product(d.b_dec, d.W_enc)
    if d.W_skip is not None:
        arrays["W_skip"] = d.W_skip.T
    return kind, arrays, config | {"apply_b_dec_to_input": False, "d_out": d.W_dec.shape[-1]}


def _kind(d: Dictionary, across: bool) -> str:
    """What SAELens calls it."""
    if isinstance(d, JumpReLU | BatchTopK):
        kind = "jumprelu"
    else:
        names = {"standard": ReLU, "gated": Gated, "topk": TopK}
        kind = next((name for name, of in names.items() if isinstance(d, of)), None)
    if kind is None or (across and kind in ("gated", "topk")):
        what = "dictionaries" if kind is None else "transcoders"
        raise UnsupportedModelError(
            f"SAELens has no {what} of the kind {type(d).__name__}; it has ReLU, JumpReLU, Gated and TopK, and "
            "transcoders of the first two."
        )
    if not across:
        return kind
    named = ("jumprelu", "skip") if kind == "jumprelu" else ("skip",)
    parts = [part for part in named if part != "skip" or d.W_skip is not None]
    return "_".join([*parts, "transcoder"])


def _write(folder: Path, config: dict[str, Any], arrays: dict[str, Any], made: Provenance) -> Path:
    tensors = {name: np.ascontiguousarray(np.asarray(x)) for name, x in arrays.items()}
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WriteError(f"`{folder}` exists and is not empty. Choose another folder.")
    try:
        with replace_folder(folder) as fresh:
            (fresh / CONFIG).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", "utf-8")
            safetensors.numpy.save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
            shutil.copymode(fresh / CONFIG, fresh / WEIGHTS)  # safetensors writes for the owner alone
            list_files(fresh, made)
    except (OSError, safetensors.SafetensorError) as error:
        raise WriteError(
            f"Cannot write to `{folder}`: {error}. Choose a folder that can be written."
        ) from error
    return folder
