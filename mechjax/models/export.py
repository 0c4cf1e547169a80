"""A model as an ordinary Hugging Face folder, which transformers, vLLM or `mechjax.load` open."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from mechjax.base.atomic import replace_folder
from mechjax.base.errors import UnsupportedModelError, WriteError, did_you_mean
from mechjax.base.provenance import provenance_of
from mechjax.hub import Tokenizer
from mechjax.hub.listing import list_files
from mechjax.models.families import EVERY, Family
from mechjax.models.families.family import write_config
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.quantized import holds_quantized
from mechjax.models.structures import Model, structure_of


@needs_decoder("weights", also=Model)
def export(
    model: Any,
    folder: Path | str,
    *,
    family: str | Family,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `model` in the layout of a Hugging Face family; loading it again gives the same bits.

    The folder appears whole or not at all: it is written beside its place and then renamed. Beside the family's files
    stands `mechjax.json`, with their checksums and where they come from; `mechjax verify` compares.

    Args:
        model: The model, of any structure.
        folder: Where to; it must not exist or be empty, unless `overwrite`.
        family: Whose layout, such as `"gpt2"` or, of an encoder, `"bert_mlm"`; its config must be able to express the
            model's. `"mechjax"` is our own, which expresses every decoder and which no other library opens.
        tokenizer: Written as tokenizer.json and tokenizer_config.json.
        overwrite: Replace the folder with all that is in it.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: An unknown family, one that cannot express this model, or one of another structure; or a
            model whose matrices are in few bits.
        WriteError: The folder exists and is not empty, or cannot be written.
    """
    table = _family(family)
    _check_kind(model, table)
    _check_full(model)
    # What the family says of special ids wins: RoBERTa counts positions from its padding id.
    config = _special_ids(tokenizer) | write_config(model.config, table) | {"dtype": _dtype(model)}
    tensors = _tensors(model, table)
    folder = Path(folder)
    if not overwrite and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WriteError(
            f"`{folder}` exists and is not empty. Choose another folder, or pass overwrite=True."
        )
    made = provenance_of(model=model, family=table.name, tokenizer=tokenizer)
    try:
        with replace_folder(folder) as fresh:
            safetensors.numpy.save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
            _write_json(fresh / "config.json", config)
            # safetensors writes for the owner alone, whatever the umask says.
            shutil.copymode(fresh / "config.json", fresh / "model.safetensors")
            if tokenizer is not None:
                tokenizer.backend.save(str(fresh / "tokenizer.json"))
                _write_json(fresh / "tokenizer_config.json", tokenizer.settings())
            list_files(fresh, made)
    except (OSError, safetensors.SafetensorError) as error:
        raise WriteError(
            f"Cannot write the model to `{folder}`: {error}. Choose a folder that can be written."
        ) from error
    return folder


def _family(family: str | Family) -> Family:
    if isinstance(family, Family):
        return family
    known = {table.name: table for table in EVERY}
    if family not in known:
        raise UnsupportedModelError(
            f"There is no family `{family}`; there are {', '.join(known)}.{did_you_mean(family, known)}"
        )
    return known[family]


def _check_kind(model: Any, family: Family) -> None:
    """A config may say the same of an encoder as of a decoder, which is another model."""
    ours, theirs = structure_of(model.config), structure_of(family.kind)
    if ours != theirs:
        fits = [table.name for table in EVERY if structure_of(table.kind) == ours]
        raise UnsupportedModelError(
            f"The {family.name} family is one of {theirs.name}; this model needs one of {ours.name}: "
            f"{', '.join(fits)}."
        )


def _dtype(model: Any) -> str:
    """What the parameters are in."""
    return next(iter(parameters(model).values())).dtype.name


def _check_full(model: Any) -> None:
    if holds_quantized(model):
        raise UnsupportedModelError(
            "`export` writes the layouts of Hugging Face, which hold floats; this model's matrices are in few bits. "
            "Write the function that it computes, `mj.export(mj.models.dequantize(model), ...)`, or the model that it "
            "was rounded from, and pass `weights=` to `mj.load`."
        )


def _tensors(model: Any, family: Family) -> dict[str, np.ndarray]:
    """Every tensor of the Hugging Face checkpoint, by name."""
    params = {path: np.asarray(leaf) for path, leaf in parameters(model).items()}
    tensors: dict[str, np.ndarray] = {}
    for rule in family.rules_for(model.config):
        for name, place in rule.places(model.config):
            parts = {path: params[path][place] for path in rule.paths}
            tensors[name] = np.ascontiguousarray(rule.join(parts, model.config))
    return tensors


def _special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """`bos_token_id` and so on; left out, they would be the family's own, perhaps not in the vocabulary."""
    names = ("bos_token", "eos_token", "pad_token")
    return {f"{name}_id": tokenizer.special_id(name) if tokenizer else None for name in names}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
