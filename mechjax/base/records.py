"""Records: frozen, shape-checked results that are pytrees, print briefly and can be saved.

A saved record is a folder of two files: `record.json` (classes, static values, provenance, and the checksum of the
arrays) and `<sha256>.safetensors` (the arrays). `record.json` is replaced in one step after the arrays are in place, so
a reader sees the old record or the new one, never a mixture. Nothing is pickled, and no name in a file becomes a path.
"""

import hashlib
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import numpy as np
import safetensors.numpy

from mechjax.base import display
from mechjax.base.atomic import replace_file
from mechjax.base.encoding import decode, encode
from mechjax.base.errors import CheckpointError, WriteError
from mechjax.base.processes import by_the_first
from mechjax.base.provenance import Provenance, provenance_of, read_provenance
from mechjax.base.signed import signed, unsigned

PAGE = "record.json"
FORMAT = "mechjax record 1"
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


def save(record: eqx.Module, folder: str | Path, **made_from: Any) -> Path:
    """Write `record` to `folder`, in one step: a reader finds the record that was there before, or this one.

    Beside it stands where it comes from (`provenance`): mechjax's version and code, packages, devices, JAX's settings,
    and each further keyword as what it was made from: `save(scores, folder, model=model, clean=clean, corrupt=corrupt,
    metric=metric, seed=0)`.

    Of several processes all must call it, and the first writes.

    Args:
        record: A record or a model.
        folder: Where to; made if it is not there. An earlier record in it is replaced, anything else is left alone.
        **made_from: What the record was made from, each under a name of the caller's: models, prompts, metrics and
            other pytrees by checksum, keys, numbers and short text as they are.

    Returns:
        The folder.

    Raises:
        ArgumentError: The record holds something that is no array and no plain value, such as a function; or it was
            made from something that has no checksum, a path, or text that looks like a secret.
        WriteError: The folder cannot be written.
    """
    folder = Path(folder)
    arrays: dict[str, np.ndarray] = {}
    tree = encode(record, "", arrays)
    made = provenance_of(**made_from)
    data = safetensors.numpy.save(arrays)
    digest = hashlib.sha256(data).hexdigest()
    sums = {
        name: f"{zlib.crc32(array.reshape(-1).view(np.uint8).data):08x}" for name, array in arrays.items()
    }
    page = {"format": FORMAT, "arrays": digest, "record": tree, "crc32": sums, "provenance": made.page()}
    text = signed(page, "indented")
    by_the_first(lambda: _put(folder, digest, data, text))
    return folder


def _put(folder: Path, digest: str, data: bytes, text: bytes) -> None:
    """The record's two files, the arrays' first.

    Raises:
        WriteError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / f"{digest}.safetensors", data)
        replace_file(folder / PAGE, text)
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
    page = read_page(folder)
    digest = page["arrays"]
    try:
        data = (folder / f"{digest}.safetensors").read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"the arrays of the record in `{folder}` cannot be read: {error.strerror}."
        ) from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise CheckpointError(
            f"the arrays in `{folder}` are truncated or were changed: their checksum differs. `mechjax verify` says "
            "which array. Save the record again, or bring the file back from a copy."
        )
    return decode(page["record"], safetensors.numpy.load(data))


def provenance(folder: str | Path) -> Provenance:
    """Where a saved record comes from: the code that made it, what it was made from, where it ran.

    Raises:
        CheckpointError: As of `restore`; or it was saved by a mechjax that did not yet say.
    """
    page = read_page(Path(folder))
    if "provenance" not in page:
        raise CheckpointError(
            f"the record in `{folder}` says nothing of where it comes from: it was saved before mechjax wrote that "
            "down. Save it again with what it was made from: mj.save(record, folder, model=model, ...)."
        )
    return read_provenance(page["provenance"])


def read_page(folder: Path) -> dict[str, Any]:
    """What `record.json` says, checked; its arrays lie in the file that has their checksum (`arrays`) as its name.

    Raises:
        CheckpointError: There is none, or one that is truncated, changed or from another version.
    """
    path = folder / PAGE
    try:
        page = unsigned(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"no record in `{folder}`: `{PAGE}` cannot be read ({error.strerror}). Give the folder that `save` wrote."
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"`{path}` {error}. Save the record again, or bring it back from a copy."
        ) from error
    if page.get("format") != FORMAT:
        raise CheckpointError(f"`{path}` is not a record that this version of mechjax can read.")
    digest = page.get("arrays")
    if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
        raise CheckpointError(
            f"`{path}` names its arrays by {digest!r:.80}, where their checksum was expected."
        )
    return page
