"""Checkpoints as models: a shipped model, a Hugging Face folder, or a name on the Hub.

Loading changes no number: a model computes what the source implementation computes. Every config key and every
tensor is used, known to be without effect, or refused by name; all of that is checked before anything is allocated.
Tensors go one by one from the files' memory maps into the stacked parameters (`Shards`), on a mesh each device's part
by itself, so that a load needs no more memory than its weights, and a process reads no more than its part of them.
"""

import math
import os
import warnings
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mechjax.base.errors import (
    ArgumentError,
    CheckpointError,
    HubError,
    MechjaxError,
    UnsupportedModelError,
    did_you_mean,
)
from mechjax.base.progress import bar
from mechjax.hub import Checkpoint, Tokenizer, fetch, is_hub_name, read_config
from mechjax.hub.folder import CONFIG
from mechjax.models.families import Family, Rule, config_from_hf
from mechjax.models.model_config import ModelConfig
from mechjax.models.params import parameters
from mechjax.models.rounding import Scheme, is_matrix, named_scheme, rounded, rounded_on_host
from mechjax.models.structures import build
from mechjax.parallel.buffers import Shards
from mechjax.parallel.shard import shard

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_CHUNK = 1 << 24
_SAME_VOCABULARY = 0.9  # a tokenizer with a smaller part of the model's tokens is taken for another model's


def load(
    name_or_folder: str | os.PathLike[str],
    *,
    dtype: Any = None,
    revision: str | None = None,
    precision: Literal["highest", "default"] = "highest",
    mesh: Mesh | None = None,
    weights: Literal["int8", "int4"] | None = None,
    group: int | None = None,
) -> tuple[Any, Tokenizer | None]:
    """A model and its tokenizer.

    Args:
        name_or_folder: A model that ships with mechjax (`"tasks-4l"`), a folder in Hugging Face layout (config.json
            and safetensors), or a name on the Hub (`"org/name"`).
        dtype: Of the parameters, such as `"bfloat16"`; None keeps the checkpoint's.
        revision: Branch, tag or commit, for a name on the Hub.
        precision: "highest" computes float32 contractions in full float32; "default" whatever is fast on the device.
        mesh: Splits every parameter over devices (`mj.make_mesh(data=2, model=4)`), as `mj.shard` would; each process
            reads only the bytes of its own. Give it prompts as they are, or on the mesh: `mj.shard(prompts, mesh)`.
        weights: "int8" or "int4" rounds the matrices of blocks as they are read, as `mj.models.quantize` would: of all
            that is rounded, about 4 million numbers are floats at a time. (Measured: a load of a Llama of 553 MB, 151
            in 8 bits and 100 in 4, takes 220 MB and 167 MB at its peak, in full 554. On a mesh, each process then
            reads all tensors, as a scale is that of a whole sum.)
        group: With `weights`, how many neighbouring weights share a scale, as `mj.models.quantize` says.

    Returns:
        The model, of the class that its structure has (`models/structures.py`): a `Decoder`, for BERT and RoBERTa an
        `Encoder`, for T5 a `T5`, for images a `ViT`, for state space models a `Mamba`; and its tokenizer, or None where
        there is no tokenizer.json.

    Raises:
        CheckpointError: Missing, truncated or hostile files; missing, left-over or misshapen weights.
        UnsupportedModelError: An unknown architecture or config key.
        HubError: A name that cannot be fetched.
        ArgumentError: A dtype that cannot be used, a revision of what is not on the Hub, absurd config numbers, a mesh
            that does not divide heads, neurons or experts, or `weights` or a group that cannot be: which, and what
            would fit.
    """
    how = named_scheme(weights, group)
    folder = locate(name_or_folder, revision)
    config, family = _understand(folder, precision)
    checkpoint = Checkpoint(folder)
    config = config if family.settled is None else family.settled(config, checkpoint.entries)
    planned = _plan(checkpoint, config, family)
    kept = _choose_dtype(dtype, checkpoint, planned)
    described = _described(config, kept, how, mesh)
    params: dict[str, Any] = {}
    with bar("Reading weights", sum(len(part.places) for part in planned)) as progress:
        progress.advance(0)  # nothing compiles here
        for part in planned:
            shards = {path: jax.tree.map(_buffer, described[path]) for path in part.rule.paths}
            for name, place in part.places.items():
                for path, tensor in part.rule.split(checkpoint[name], config).items():
                    held = (
                        tensor
                        if how is None or not is_matrix(path)
                        else rounded_on_host(tensor, kept, path, how)
                    )
                    jax.tree.map(lambda buffer, values, at=place: buffer.put(values, at), shards[path], held)
            params |= {path: jax.tree.map(Shards.array, shards.pop(path)) for path in part.rule.paths}
            progress.advance(len(part.places))
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer is not None:
        _check_vocabulary(tokenizer, config, folder)
    return build(config, params), tokenizer


def load_config(name_or_folder: str | os.PathLike[str], *, revision: str | None = None) -> Any:
    """The config of what `load` would load; reads of weights the headers that are here, and fetches none from the Hub.

    Raises:
        CheckpointError: No such folder, or a broken config.json.
        UnsupportedModelError: An unknown architecture or config key.
        HubError: A name that cannot be fetched.
        ArgumentError: A revision of what is not on the Hub, or absurd config numbers.
    """
    folder = locate(name_or_folder, revision, weights=False)
    config, family = _understand(folder)
    if family.settled is None:
        return config
    try:
        return family.settled(config, Checkpoint(folder).entries)
    except CheckpointError:  # only its small files are here
        return config


def zoo() -> dict[str, Path]:
    """The models that ship with mechjax: name to folder."""
    shelf = Path(str(resources.files("mechjax.models"))) / "zoo"
    return {path.parent.name: path.parent for path in sorted(shelf.glob("*/config.json"))}


def locate(
    name_or_folder: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
) -> Path:
    """The folder that is meant: shipped, local, or fetched from the Hub (without `weights`, its small files alone).

    Raises:
        CheckpointError: No such folder.
        HubError: A name that cannot be fetched.
        ArgumentError: A revision of what is not on the Hub.
    """
    name = os.fspath(name_or_folder)
    shipped, folder = zoo().get(name), Path(name).expanduser()
    if shipped is None and not folder.is_dir() and is_hub_name(name):
        try:
            return fetch(name, revision=revision, check=_understand, weights=weights)
        except HubError as error:
            raise HubError(f"{error} There is no folder `{name}` here either.") from None
    if revision is not None:
        raise ArgumentError(f"revision={revision!r} is for names on the Hub (`org/name`); `{name}` is none.")
    if shipped is None and not folder.is_dir():
        raise CheckpointError(
            f"`{name}` is neither a model that ships with mechjax ({', '.join(zoo()) or 'none here'}) nor a folder."
            f"{did_you_mean(name, zoo())} A model on the Hub is spelled `org/name`, such as `openai-community/gpt2`."
        )
    return shipped or folder


def _understand(folder: Path, precision: Literal["highest", "default"] = "highest") -> tuple[Any, Family]:
    """The folder's config as ours, and whose it is."""
    hf = read_config(folder)
    try:
        return config_from_hf(hf, precision=precision)
    except MechjaxError:
        raise
    # A value of another type than the family's table expects: hostile, or not written by transformers.
    except Exception as error:
        raise UnsupportedModelError(
            f"`{folder / CONFIG}` cannot be read as a model's config ({type(error).__name__}: {error}). Compare it "
            "with a config.json that transformers writes for this architecture."
        ) from error


@dataclass(frozen=True)
class _Part:
    """The parameters of one rule: for each tensor of the checkpoint that fills them, where (layer, head) it stands."""

    rule: Rule
    places: dict[str, tuple[int, ...]]


def _plan(checkpoint: Checkpoint, config: ModelConfig, family: Family) -> list[_Part]:
    """Every tensor that the model needs, after checking that they are all there, fit, and that none is left over."""
    left = dict.fromkeys(checkpoint.entries)
    if config.n_layers > len(left):
        raise CheckpointError(
            f"The config of `{checkpoint.folder}` asks for {config.n_layers} layers, but the checkpoint holds only "
            f"{len(left)} tensors. Config and weights belong to different models."
        )
    planned, missing = [], []
    for rule in family.rules_for(config):
        places: dict[str, tuple[int, ...]] = {}
        for full, place in rule.places(config):
            name = next((n for n in family.spellings(full) if n in left), None)
            if name is None:
                missing.append(full)
            else:
                del left[name]
                places[name] = place
        planned.append(_Part(rule, places))
    left_over = [name for name in left if not family.ignorable(name, config)]
    if missing:
        raise CheckpointError(
            f"`{checkpoint.folder}` lacks {_count(missing, 'tensor')} that its config calls for: {_some(missing)}."
            f"{did_you_mean(missing[0], left_over)} Config and weights belong to different models."
        )
    if left_over:
        raise CheckpointError(
            f"`{checkpoint.folder}` holds {_count(left_over, 'tensor')} that a {family.name} model of its config does "
            f"not have: {_some(left_over)}. They would be dropped silently, so the load is refused."
        )
    _check_filled(planned, config, family)
    _check_shapes(planned, checkpoint, config)
    _check_tied(left, planned, checkpoint)
    return planned


def _check_filled(planned: list[_Part], config: ModelConfig, family: Family) -> None:
    """Every layer, head and expert of every parameter has its tensor: buffers are made uninitialised."""
    filled = dict.fromkeys(config.shapes, 0)
    for part in planned:
        distinct = set(part.places.values())
        for path in part.rule.paths:
            rank = len(next(iter(distinct), ()))
            filled[path] += len(distinct) * math.prod(config.shapes[path][rank:])
    for path, shape in config.shapes.items():
        if filled[path] != math.prod(shape):
            raise UnsupportedModelError(
                f"The rules of the {family.name} family fill {filled[path]} of the {math.prod(shape)} numbers of "
                f"`{path}`: the rest would be whatever memory held. Give the family's table one rule for it, with a "
                "place for every layer."
            )


def _check_shapes(planned: list[_Part], checkpoint: Checkpoint, config: ModelConfig) -> None:
    for part in planned:
        right = part.rule.shape(config)
        for name in part.places:
            if (found := checkpoint.entries[name].shape) != right:
                raise CheckpointError(
                    f"Tensor `{name}` of `{checkpoint.folder}` has the shape {found}; its config calls for {right}."
                )


def _check_tied(copies: dict[str, None], planned: list[_Part], checkpoint: Checkpoint) -> None:
    """A stored unembedding of a tied model is ignored, so it has to be the embedding."""
    embedding = next((name for part in planned if part.rule.paths == ("W_E",) for name in part.places), None)
    if embedding is None:
        return
    first, right = checkpoint[embedding], checkpoint.entries[embedding]
    for name in copies:
        entry = checkpoint.entries[name]
        if (entry.shape, entry.dtype) != (right.shape, right.dtype):
            continue  # a stored mask or table
        rows = max(1, _CHUNK // max(1, first.shape[1]))
        for start in range(0, len(first), rows):
            if not np.array_equal(first[start : start + rows], checkpoint[name][start : start + rows]):
                raise CheckpointError(
                    f"The config of `{checkpoint.folder}` ties the unembedding to the embedding, but `{name}` differs "
                    f"from `{embedding}`. Set `tie_word_embeddings` to false in config.json, or remove `{name}`."
                )


def _choose_dtype(asked: Any, checkpoint: Checkpoint, planned: list[_Part]) -> np.dtype:
    """The parameters' dtype: the one asked for, or the checkpoint's own."""
    found = {checkpoint.entries[name].dtype.name: name for part in planned for name in part.places}
    for name in found.keys() - set(_FLOATS):
        raise CheckpointError(
            f"Tensor `{found[name]}` of `{checkpoint.folder}` is {name}: quantized weights are not supported. Load a "
            f"checkpoint in {', '.join(_FLOATS[:3])}."
        )
    if asked is None and len(found) > 1:
        listed = ", ".join(f"{dtype} (`{name}`)" for dtype, name in sorted(found.items()))
        raise CheckpointError(f"`{checkpoint.folder}` mixes dtypes: {listed}. Choose one with `dtype=`.")
    try:
        dtype = np.dtype(next(iter(found))) if asked is None else jnp.dtype(asked)
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in _FLOATS:
        raise ArgumentError(f"dtype={asked!r} is not one of {', '.join(_FLOATS)}.")
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ArgumentError(
            f"The weights of `{checkpoint.folder}` would be float64, which JAX cuts to float32 unless told otherwise. "
            'Pass dtype="float32", or set jax.config.update("jax_enable_x64", True).'
        )
    return dtype


def _described(config: ModelConfig, dtype: np.dtype, how: Scheme | None, mesh: Mesh | None) -> dict[str, Any]:
    """Every parameter by shapes, which say where it lies on a mesh, by path."""

    def made() -> Any:
        params = {path: jnp.zeros(shape, dtype) for path, shape in config.shapes.items()}
        if how is not None:
            params |= {path: rounded(W, path, how) for path, W in params.items() if is_matrix(path)}
        return build(config, params)

    shapes = jax.eval_shape(made)
    return parameters(shapes if mesh is None else shard(shapes, mesh))


def _buffer(shape: jax.ShapeDtypeStruct) -> Shards:
    return Shards(shape.shape, np.dtype(shape.dtype), cast(NamedSharding | None, shape.sharding))


def _check_vocabulary(tokenizer: Tokenizer, config: Any, folder: Path) -> None:
    """Warn of a tokenizer that seems to be another model's. Embeddings padded by a few rows are usual."""
    largest, has = max(tokenizer.backend.get_vocab().values(), default=-1), config.d_vocab
    if largest >= has:
        warnings.warn(
            f"The tokenizer of `{folder}` gives ids up to {largest}, the model has {has} tokens: larger ids will be "
            "refused when the model is called. Is it the tokenizer of this model?",
            stacklevel=3,
        )
    elif largest + 1 < _SAME_VOCABULARY * has:
        warnings.warn(
            f"The tokenizer of `{folder}` has {largest + 1} tokens, the model {has}, far more than padding explains. "
            "Is it the tokenizer of this model?",
            stacklevel=3,
        )


def _count(names: list[str], noun: str) -> str:
    return f"{len(names)} {noun}{'s' if len(names) > 1 else ''}"


def _some(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names[:5]) + (", ..." if len(names) > 5 else "")
