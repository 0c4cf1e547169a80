"""A checkpoint folder in Hugging Face layout: config.json, safetensors in one file or in shards with an index.

Names inside the folder's files never become paths: a shard is a plain file name in this folder. Links may not
leave it either, except into the `blobs` beside it that the Hub's own cache is made of.
"""

from pathlib import Path
from typing import Any

import numpy as np

from mechjax.base.errors import CheckpointError, did_you_mean
from mechjax.hub.json_files import read_object
from mechjax.hub.tensor_file import Entry, TensorFile

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_FOREIGN = (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".ckpt", ".index")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json.

    Raises:
        CheckpointError: No folder, no config.json, or one that is not valid.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder `{folder}`.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"`{folder}` has no {CONFIG}, so it is no Hugging Face model folder. It holds: {_listing(folder)}."
        )
    return read_object(inside(folder, CONFIG))


class Checkpoint:
    """The tensors of a folder over all its shards; `checkpoint[name]` is a read-only view of a memory map.

    Attributes:
        folder: Where it lies.
        entries: Dtype and shape of every tensor, known without reading any.
    """

    def __init__(self, folder: Path):
        """Open every shard and check it against the index.

        Raises:
            CheckpointError: Missing or hostile files, or an index and shards that disagree.
        """
        self.folder = folder
        if (folder / WEIGHTS).is_file():
            file = TensorFile(inside(folder, WEIGHTS))
            self._shard = dict.fromkeys(file.entries, file)
        elif (folder / INDEX).is_file():
            self._shard = _open_shards(folder, read_index(folder))
        else:
            raise CheckpointError(_no_weights(folder))
        self.entries: dict[str, Entry] = {name: file.entries[name] for name, file in self._shard.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._shard:
            raise CheckpointError(
                f"`{self.folder}` holds no tensor `{name}`.{did_you_mean(name, self._shard)}"
            )
        return self._shard[name][name]


def read_index(folder: Path) -> dict[str, str]:
    """The index's `weight_map`: tensor name to the plain name of the shard that holds it.

    Raises:
        CheckpointError: No such map, or a shard's name that is a path or not a `.safetensors` file.
    """
    weight_map = read_object(inside(folder, INDEX)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"`{folder / INDEX}` has no `weight_map` from tensor names to shards.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0:*?["):
            raise CheckpointError(
                f"`{folder / INDEX}` places `{tensor}` in {shard!r}; the plain name of a .safetensors file in the "
                "same folder was expected. Do not load folders from sources that you do not trust."
            )
    return weight_map


def _open_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorFile]:
    """The shard of every tensor, after checking that index and shards list the same tensors."""
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise CheckpointError(
            f"`{folder}` lacks {len(missing)} of the {len(shards)} shards that its index names: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Download the folder again."
        )
    files = {shard: TensorFile(inside(folder, shard)) for shard in shards}
    for tensor, shard in weight_map.items():
        if tensor not in files[shard].entries:
            raise CheckpointError(
                f"The index of `{folder}` places `{tensor}` in {shard}, which does not hold it."
            )
    for shard, file in files.items():
        stray = next((tensor for tensor in file.entries if weight_map.get(tensor) != shard), None)
        if stray is not None:
            place = f"places it in {weight_map[stray]}" if stray in weight_map else "does not list it"
            raise CheckpointError(f"{shard} in `{folder}` holds `{stray}`, but the index {place}.")
    return {tensor: files[shard] for tensor, shard in weight_map.items()}


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, after following links.

    Raises:
        CheckpointError: A link leads out of the folder (the Hub cache's own `blobs` are allowed).
    """
    home, target = folder.resolve(), (folder / name).resolve()
    # A folder of a snapshot may lie deeper in it.
    stores = [at.parent.parent / "blobs" for at in (home, *home.parents) if at.parent.name == "snapshots"]
    homes = [home, *stores]
    if not any(target.is_relative_to(allowed) for allowed in homes):
        raise CheckpointError(
            f"`{folder / name}` is a link that leaves its folder. Copy the file here, or load the folder it is in."
        )
    return target


def _no_weights(folder: Path) -> str:
    """What to say of a folder without safetensors: which converter makes them, where other weights lie there."""
    foreign = sorted(path.name for path in folder.iterdir() if path.suffix in _FOREIGN)
    convert = (
        'Convert once where PyTorch and transformers are installed: `python -c "from transformers import '
        "AutoModelForCausalLM as A; A.from_pretrained('FROM').save_pretrained('TO')\"`, or on the Hub with "
        "https://huggingface.co/spaces/safetensors/convert."
    )
    if foreign:
        return (
            f"`{folder}` has its weights only as {', '.join(foreign[:5])}; mechjax reads safetensors and never "
            f"unpickles. {convert}"
        )
    return f"`{folder}` has neither {WEIGHTS} nor {INDEX}. It holds: {_listing(folder)}. {convert}"


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "nothing"
