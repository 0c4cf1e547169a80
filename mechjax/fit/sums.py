"""Checksums of a checkpoint: of each part of an array that a device held, and of each file.

Each process writes `checksums.<k>-of-<n>.json`, for the parts that it was the first to hold, and for the files that it
wrote. Arrays are compared wherever they are restored; files, of which some hold no numbers, by `verify_step`.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mechjax.base.digests import file_digest
from mechjax.base.errors import CheckpointError
from mechjax.base.signed import unsigned

FORMAT = 1
_SUMS = re.compile(r"checksums\.(\d+)-of-(\d+)\.json")
_OF_PROCESS = re.compile(r"ocdbt\.process_(\d+)")


def sums_file() -> str:
    """The name of this process's file."""
    return f"checksums.{jax.process_index()}-of-{jax.process_count()}.json"


def sums_files(step: Path) -> list[Path]:
    """The files of all processes, in their order."""
    found = (path for path in step.glob("checksums.*.json") if _SUMS.fullmatch(path.name))
    return sorted(found, key=lambda path: int(path.name.split(".")[1].split("-")[0]))


def has_all_sums(step: Path) -> bool:
    """Whether every process that wrote the step has told its checksums."""
    names = [path.name for path in sums_files(step)]
    return bool(names) and len(names) == int(names[0].split("-of-")[1].removesuffix(".json"))


def sums_of(x: Any) -> dict[str, Any]:
    """Shape, dtype, and a checksum of each part of an array that this process is the first to hold."""
    parts = [([slice(None)] * np.ndim(x), x)]
    if isinstance(x, jax.Array):
        parts = [(shard.index, shard.data) for shard in x.addressable_shards if shard.replica_id == 0]
    return {
        "shape": list(np.shape(x)),
        "dtype": str(x.dtype),
        "parts": [{"at": _span(at, np.shape(x)), "sha256": _sum(part)} for at, part in parts],
    }


def files_of(step: Path) -> dict[str, Any]:
    """Size and checksum of each file that this process answers for: those in its folder, and of the first the rest."""
    return {
        name: {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for name, path in own_files(step).items()
        if _answers(name, step)
    }


def own_files(step: Path) -> dict[str, Path]:
    """Every file of a step but the checksums, by its name from there."""
    found = (path for path in sorted(step.rglob("*")) if path.is_file() or path.is_symlink())
    return {
        path.relative_to(step).as_posix(): path
        for path in found
        if not _SUMS.fullmatch(path.name) and not path.name.startswith(".")
    }


def read_sums(file: Path) -> dict[str, Any]:
    """What a process told of a step.

    Raises:
        ValueError: It cannot be read, or was changed.
        CheckpointError: It is of a later version.
    """
    try:
        page = unsigned(file.read_bytes())
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if page.get("format") != FORMAT:
        raise CheckpointError(
            f"the checkpoint `{file.parent}` has format {page.get('format')}, and this version reads {FORMAT}: read it "
            "with the version of mechjax that wrote it."
        )
    return page


def spans_of(found: Any) -> dict[str, Any] | None:
    """The parts that this process holds of an array that no process holds whole; None of one that it does."""
    if not isinstance(found, jax.Array) or found.is_fully_addressable:
        return None
    return {str(_span(shard.index, found.shape)): shard.data for shard in found.addressable_shards}


def is_held(part: dict[str, Any], held: dict[str, Any] | None) -> bool:
    """Whether this process can compare a part."""
    return held is None or str(part["at"]) in held


def differs(part: dict[str, Any], found: Any, held: dict[str, Any] | None = None) -> bool:
    """Whether a part of an array is not what was written."""
    data = found[tuple(slice(*span) for span in part["at"])] if held is None else held[str(part["at"])]
    return _sum(data) != part["sha256"]


def _answers(name: str, step: Path) -> bool:
    wrote = _OF_PROCESS.fullmatch(name.split("/", maxsplit=1)[0])
    return (0 if wrote is None else int(wrote[1])) == jax.process_index()


def _span(at: Any, shape: tuple[int, ...]) -> list[list[int]]:
    return [list(one.indices(n)[:2]) for one, n in zip(at, shape, strict=True)]


def _sum(part: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest()
