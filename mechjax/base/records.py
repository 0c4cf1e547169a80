"""Records: frozen, shape-checked results that are pytrees, print briefly and can be saved.

A saved record is a folder of two files: `record.json` (classes, static values, and the checksum of the arrays) and
`<sha256>.safetensors` (the arrays). `record.json` is replaced in one step after the arrays are in place, so a reader
sees the old record or the new one, never a mixture. Nothing is pickled, and no name in a file becomes a path.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
import safetensors.numpy

from mechjax.base import display
from mechjax.base.encoding import decode, encode
from mechjax.base.errors import CheckpointError, WriteError
from mechjax.base.processes import by_the_first

_FORMAT = "mechjax record 1"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Record(eqx.Module):
    """Base of every result. Fields are arrays (leaves) or marked static.

    The axes of an array field are read from its annotation. A starred axis (`Float[Array, "*over batch"]`) stands
    for the names in the static field that it names (`over = ("layer", "pos")`).
    """

    def axis_names(self, field: str, key: str | None = None) -> tuple[str, ...] | None:
        """Names of the axes of an array field (of one array of a table, by key); None where they are not known."""
        return display.names_by_annotation(self, field, key)

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """For some axes, the name of each index: `{"pos": ("IO", "S1", "S2", "END")}`. Override where there are any."""
        return {}

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per cell of the first array field: its place, and every field with the same axes."""
        return display.rows(self, self.axis_labels())

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` cells of the first array field that are largest in size, as (label, value)."""
        return display.top(self, n, self.axis_labels())

    def __repr__(self) -> str:
        return display.as_text(self, self.axis_labels())

    def _repr_html_(self) -> str:
        return display.as_html(self, self.axis_labels())


def save(record: eqx.Module, folder: str | Path) -> Path:
    """Write `record` to `folder`, in one step: a reader finds the record that was there before, or this one.

    Of several processes all must call it, and the first writes.

    Args:
        record: A record or a model.
        folder: Where to; made if it is not there. An earlier record in it is replaced, anything else is left alone.

    Returns:
        The folder.

    Raises:
        ArgumentError: The record holds something that is no array and no plain value, such as a function.
        WriteError: The folder cannot be written.
    """
    folder = Path(folder)
    arrays: dict[str, np.ndarray] = {}
    tree = encode(record, "", arrays)
    data = safetensors.numpy.save(arrays)
    digest = hashlib.sha256(data).hexdigest()
    page = {"format": _FORMAT, "arrays": digest, "record": tree}
    text = json.dumps({"sha256": _digest(page), **page}, indent=1, allow_nan=False)
    by_the_first(lambda: _put(folder, digest, data, text))
    return folder


def _put(folder: Path, digest: str, data: bytes, text: str) -> None:
    """The record's two files, the arrays' first.

    Raises:
        WriteError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{digest}.safetensors", data)
        replace_file(folder / "record.json", text.encode())
        for stale in folder.glob("*.safetensors"):
            if _SHA256.fullmatch(stale.stem) and stale.stem != digest:
                stale.unlink()
    except OSError as error:
        raise WriteError(
            f"cannot write the record to `{folder}`: {error.strerror or error}. Choose a folder that can be written."
        ) from error


def restore(folder: str | Path) -> Any:
    """Read what `save` wrote: the same class, the same static values, the same bits.

    Raises:
        CheckpointError: The folder holds no record, or one that is truncated, changed or from another version.
    """
    folder = Path(folder)
    try:
        page: Any = json.loads((folder / "record.json").read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"no record in `{folder}`: `record.json` cannot be read ({error.strerror}). "
            "Give the folder that `save` wrote."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"`{folder / 'record.json'}` is not whole: {error}. Save the record again."
        ) from error
    if not isinstance(page, dict) or page.get("format") != _FORMAT:
        raise CheckpointError(
            f"`{folder / 'record.json'}` is not a record that this version of mechjax can read."
        )
    digest = page.get("arrays")
    if (
        page.pop("sha256", None) != _digest(page)
        or not isinstance(digest, str)
        or not _SHA256.fullmatch(digest)
    ):
        raise CheckpointError(
            f"`{folder / 'record.json'}` was changed after it was saved: its checksum differs."
        )
    try:
        data = (folder / f"{digest}.safetensors").read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"the arrays of the record in `{folder}` cannot be read: {error.strerror}."
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"the arrays in `{folder}` are truncated or were changed: their checksum differs."
        )
    return decode(page["record"], safetensors.numpy.load(data))


def _digest(page: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, on disk before it has its name: whoever reads finds all of it or none."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".saving-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
