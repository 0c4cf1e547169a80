"""Dictionaries from files of other libraries: which format they are in, and the reader of it.

Nothing is unpickled and no name from a file becomes a path. What a file holds is used, known to say nothing of the
function, or refused by name; latents and reconstructions are those of the library that wrote it.
"""

import os
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError, CheckpointError, HubError, did_you_mean
from mechjax.dictionaries.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llama_scope,
    openai,
    saelens,
    sparsify,
)
from mechjax.dictionaries.formats.format import Format, Place
from mechjax.dictionaries.formats.weights import wide
from mechjax.hub.fetch import fetch_files, is_hub_name

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        saelens.FORMAT,
        sparsify.FORMAT,
        dictionary_learning.FORMAT,
        openai.FORMAT,
        gemma_scope.FORMAT,
        gemma_scope_2.FORMAT,
        gemma_scope_2.CLT,
        circuit_tracer.FORMAT,
        circuit_tracer.CLT,
        llama_scope.FORMAT,
    )
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_CONFIGS = ("cfg.json", "config.json", "config.yaml", "hyperparams.json", "activation_scaler.json")
_SINGLE = (
    "sae_weights.safetensors",
    "sae.safetensors",
    "ae.pt",
    "params.npz",
    "params.safetensors",
    "checkpoints/final.safetensors",
)
_NUMBERED = ("layer_", "params_layer_", "W_enc_", "W_dec_")
_DIGITS = ("[0-9]", "[0-9][0-9]", "[0-9][0-9][0-9]")
_WIDE = ("threshold", "bandwidth")  # float32 at least, whatever the weights are
_SCALED = ("saelens", "gemma_scope")


def load(
    path_or_hub_name: str | os.PathLike[str],
    *,
    format: str | None = None,
    layer: int | None = None,
    scale: float | int | None = None,
    dtype: Any = "float32",
    revision: str | None = None,
) -> Any:
    """A dictionary that ships with mechjax, or one from the files of another library.

    Args:
        path_or_hub_name: A dictionary that ships with mechjax (`"tasks-4l-resid_post-2"`), a folder, a file in it, or
            the same in a repository of the Hub: `"org/name/folder/in/it"`.
        format: One of `FORMATS`; None to tell from the files.
        layer: Which of a set of transcoders for each layer; None for all of them, stacked along a first axis
            (`eqx.filter_vmap` maps over it).
        scale: What inputs are multiplied by before, and outputs divided by after, where files leave that out: SAELens'
            `norm_scaling_factor`, `d_model ** -0.5` for Gemma Scope's embeddings.
        dtype: Of the parameters; thresholds are float32 at least.
        revision: Branch, tag or commit, for a name on the Hub.

    Returns:
        A `Dictionary` of the kind that the files hold; `Normalized` around one where each token is normalised; a
        `CrossLayerTranscoder` for one across layers.

    Raises:
        CheckpointError: Files that are missing, truncated, hostile, inconsistent or of no known format.
        UnsupportedModelError: A kind or setting that mechjax does not have.
        HubError: A name that cannot be fetched.
        ArgumentError: An unknown format, or an argument that does not apply to this one.
    """
    if format is not None and format not in FORMATS:
        raise ArgumentError(
            f"format={format!r} is not known; there are {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}"
        )
    kept = _dtype(dtype)
    path = _located(os.fspath(path_or_hub_name), layer, revision)
    folder, file = (path, None) if path.is_dir() else (path.parent, path.name)
    found = FORMATS[format] if format is not None else _detected(folder, file)
    if layer is not None and found is not circuit_tracer.FORMAT:
        raise ArgumentError(f"layer={layer}: files of {found.name} hold one dictionary. Leave it out.")
    if scale is not None and found.name not in _SCALED:
        raise ArgumentError(f"scale={scale}: files of {found.name} say how inputs are scaled. Leave it out.")
    return _cast(found.read(Place(folder, file, layer, np.dtype(wide(kept)), scale)), kept)


def _detected(folder: Path, file: str | None) -> Format:
    """The one format that the files of a folder are in."""
    names = {path.name for path in folder.iterdir()}
    fitting = [known for known in FORMATS.values() if known.fits(names, file)]
    if len(fitting) == 1:
        return fitting[0]
    listed = ", ".join(sorted(names)[:12]) + (", ..." if len(names) > 12 else "") or "nothing"
    asked = f"`{folder / file}`" if file else f"`{folder}`"
    if fitting:
        raise CheckpointError(
            f"{asked} could be {' or '.join(known.name for known in fitting)}: say which with `format=`. The folder "
            f"holds: {listed}."
        )
    if circuit_tracer.CONFIG in names and (elsewhere := circuit_tracer.elsewhere(folder)):
        raise CheckpointError(
            f"`{folder / circuit_tracer.CONFIG}` says that weights lie elsewhere, at {', '.join(elsewhere[:2])} and "
            "so on. Load those by their own names, without `hf://`."
        )
    known = "; ".join(f"{known.name} ({known.writer})" for known in FORMATS.values())
    raise CheckpointError(
        f"{asked} is in no known format. The folder holds: {listed}. Known are: {known}. If its files have other "
        "names, say which they are with `format=`; if they lie in a folder below, name that one."
    )


def zoo() -> dict[str, Path]:
    """The dictionaries that ship with mechjax: name to folder."""
    shelf = Path(str(resources.files("mechjax.dictionaries"))) / "zoo"
    return {path.parent.name: path.parent for path in sorted(shelf.glob(f"*/{saelens.CONFIG}"))}


def _located(name: str, layer: int | None, revision: str | None) -> Path:
    """The folder or file that is meant, fetched if need be."""
    path = zoo().get(name) or Path(name).expanduser()
    parts = name.split("/")
    on_hub = len(parts) >= 2 and is_hub_name("/".join(parts[:2]))
    if path.exists() or not on_hub:
        if revision is not None:
            raise ArgumentError(f"revision={revision!r} is for names on the Hub; `{name}` is none.")
        if not path.exists():
            raise CheckpointError(
                f"There is no file or folder `{name}`, and none of the dictionaries that ship with mechjax "
                f"({', '.join(zoo())}) is called so.{did_you_mean(name, zoo())} A dictionary on the Hub is spelled "
                "`org/name/folder/in/it`."
            )
        return path
    inner = parts[2:]
    if any(part in ("", ".", "..") or set(part) & set("\\\0*?[]") for part in inner):
        raise ArgumentError(
            f"`{name}`: plain names of folders, parted by `/`, were expected after `org/name`."
        )
    try:
        folder = fetch_files("/".join(parts[:2]), _wanted(inner, layer), revision=revision)
    except HubError as error:
        raise HubError(f"{error} There is no folder `{name}` here either.") from None
    path = folder.joinpath(*inner)
    if not path.exists():
        raise HubError(
            f"`{'/'.join(parts[:2])}` has no dictionary at `{'/'.join(inner)}` in a known format. Look at its files "
            "on the Hub, and name the folder in which they lie."
        )
    return path


def _wanted(inner: list[str], layer: int | None) -> list[str]:
    """Patterns of what is fetched: names of the known formats in the one folder, and nothing below it."""
    file = inner[-1] if inner and inner[-1].endswith((".pt", ".npz", ".safetensors")) else None
    folder = inner[:-1] if file else inner
    if file:
        weights = [file]
    elif layer is not None:
        weights = [f"layer_{layer}.safetensors"]
    else:
        weights = [*_SINGLE, *(f"{start}{n}.safetensors" for start in _NUMBERED for n in _DIGITS)]
    return ["/".join([*folder, name]) for name in (*_CONFIGS, *weights)]


def _dtype(dtype: Any) -> np.dtype:
    try:
        kept = np.dtype(jnp.dtype(dtype))
    except TypeError:
        kept = None
    if kept is None or kept.name not in _DTYPES:
        raise ArgumentError(f"dtype={dtype!r} is not one of {', '.join(_DTYPES)}.")
    if jax.dtypes.canonicalize_dtype(kept) != kept:
        raise ArgumentError(
            'dtype="float64" would be cut to float32 by JAX. Set jax.config.update("jax_enable_x64", True) first.'
        )
    return kept


def _cast(made: Any, dtype: np.dtype) -> Any:
    """The dictionary in another dtype."""

    def cast(path: tuple[Any, ...], x: Any) -> Any:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x
        return x.astype(wide(dtype) if getattr(path[-1], "name", "") in _WIDE else dtype)

    return jax.tree_util.tree_map_with_path(cast, made)
