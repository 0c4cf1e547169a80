"""What looking at an artefact's files finds, whatever the artefact is."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from mechjax.base.digests import file_digest
from mechjax.base.errors import CheckpointError
from mechjax.base.provenance import Provenance, read_provenance
from mechjax.hub.folder import inside
from mechjax.hub.listing import crc_of
from mechjax.hub.tensor_file import TensorFile


@dataclass(frozen=True)
class File:
    """A file of an artefact.

    Attributes:
        name: Its name from the artefact's folder.
        size: Its bytes; 0 where it is missing.
        problem: What is wrong with it, in words; empty where it is what was written.
        arrays: Which arrays in it are not what was written, where that can be told.
    """

    name: str
    size: int
    problem: str = ""
    arrays: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """What was found.

    Attributes:
        files: Every file that was compared, and every one that is missing.
        provenance: Where the artefact comes from, where it says so.
        notes: What is no damage and yet worth knowing.
        summed: Whether there are checksums, so that it is known to be whole; else it is only known to be consistent.
    """

    files: tuple[File, ...]
    provenance: tuple[Provenance, ...] = ()
    notes: tuple[str, ...] = ()
    summed: bool = True

    def under(self, folder: str) -> "Found":
        """The same, seen from the folder above."""
        files = tuple(replace(file, name=f"{folder}/{file.name}") for file in self.files)
        notes = tuple(f"{folder}: {note}" for note in self.notes)
        return Found(files, self.provenance, notes, self.summed)


def joined(every: Iterator[Found] | tuple[Found, ...]) -> Found:
    """What was found in several places, as one."""
    every = tuple(every)
    made = dict.fromkeys(one for found in every for one in found.provenance)
    notes = dict.fromkeys(note for found in every for note in found.notes)
    files = tuple(file for found in every for file in found.files)
    return Found(files, tuple(made), tuple(notes), all(found.summed for found in every))


def compared(folder: Path, name: str, wanted: Any, sums: Any = None) -> File:
    """A file, compared with the size and SHA-256 that it was written with.

    Args:
        folder: Where it is.
        name: Its name, one of a file that is there, or only told.
        wanted: Its `bytes` and `sha256`.
        sums: For each of its tensors the CRC-32, where it is a safetensors file: they tell which one is damaged.
    """
    if not _is_below(name) or not (folder / name).is_file():
        return File(name, 0, "is missing")
    try:
        path = inside(folder, name)
    except CheckpointError as error:
        return File(name, 0, told(error, folder))
    size = path.stat().st_size
    if file_digest(path) == wanted.get("sha256"):
        return File(name, size)
    least = wanted.get("bytes", size)
    what = "was changed" if size == least else f"has {size} bytes where {least} were written"
    return File(name, size, what, damaged_tensors(path, sums or {}))


def _is_below(name: str) -> bool:
    """Whether a name that a file tells can only be that of a file in a folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not set(name) & set("\\\0:") and not {"..", "/"} & set(parts)


def damaged_tensors(path: Path, sums: dict[str, str]) -> tuple[str, ...]:
    """Which tensors of a safetensors file are not what was written; its header, where that is what is not."""
    if path.suffix != ".safetensors":
        return ()
    try:
        tensors = TensorFile(path)
    except CheckpointError:
        return ("the header",)
    changed = (
        name for name, crc in sums.items() if name not in tensors.entries or crc_of(tensors[name]) != crc
    )
    return tuple(changed) or ("the header",)


def made_of(page: dict[str, Any]) -> tuple[tuple[Provenance, ...], tuple[str, ...]]:
    """The provenance that a page holds, and what is to be said where it holds none that can be read."""
    if "provenance" not in page:
        return (), ("says nothing of where it comes from: an older mechjax wrote it",)
    try:
        return (read_provenance(page["provenance"]),), ()
    except CheckpointError as error:
        return (), (str(error),)


def told(error: Exception, folder: Path) -> str:
    """An error's words, without the folder that all of it is about."""
    return str(error).replace(f"{folder}/", "").strip().rstrip(".")


def size_of(path: Path) -> int:
    """Bytes of a file; 0 of none."""
    return path.stat().st_size if path.is_file() else 0
