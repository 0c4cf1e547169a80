"""Sweeps in a folder: `sweep.json` says what is swept, files of units and of the two runs hold numbers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mechjax.artefacts.found import File, Found, size_of, told
from mechjax.base.digests import arrays_digest, tree_digest
from mechjax.base.errors import CheckpointError
from mechjax.base.signed import page_digest, unsigned
from mechjax.hub.folder import inside
from mechjax.hub.tensor_file import TensorFile

PAGE = "sweep.json"
_UNIT = re.compile(r"unit-(\d+)\.safetensors")
_RUNS = "runs.safetensors"
_FORMATS: dict[str, tuple[Callable[[dict[str, np.ndarray]], str], Callable[[str], Any]]] = {
    "mechjax sweep 1": (lambda arrays: tree_digest(arrays["scores"]), lambda name: int(name[5:-12])),
    "mechjax sweep 2": (arrays_digest, lambda name: name),
}
"""For each format the checksum of a file's arrays, and what the file with a name calls itself."""
_WITH_RUNS = ("mechjax sweep 2",)


def fits(path: Path) -> bool:
    """Whether a sweep lies there, or the units of one that has lost its page."""
    return (path / PAGE).is_file() or bool(_units(path))


def check(path: Path) -> Found:
    """Compare every file with the checksum in it, and with that of the sweep."""
    page, problem = None, ""
    try:
        page = unsigned((path / PAGE).read_bytes())
    except FileNotFoundError:
        problem = "is missing: nothing says of which sweep the units are"
    except (OSError, ValueError) as error:
        problem = str(error)
    if page is not None and page.get("format") not in _FORMATS:
        problem, page = f"has the format {page.get('format')!r}, which this mechjax does not know", None
    units = _units(path)
    files = [_file(path, name, page) for name in units]
    if (path / _RUNS).is_file():
        files.append(_file(path, _RUNS, page))
    elif units and page is not None and page["format"] in _WITH_RUNS:  # they are written first
        files.append(File(_RUNS, 0, "is missing"))
    return Found((File(PAGE, size_of(path / PAGE), problem), *files), (), _notes(page, units))


def _units(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("unit-*.safetensors") if _UNIT.fullmatch(file.name))


def _notes(page: dict[str, Any] | None, units: list[str]) -> tuple[str, ...]:
    if page is None:
        return ()
    words = [
        f"{name} {value[:12]}" for name in ("model", "clean", "corrupt") if (value := str(page.get(name)))
    ]
    if isinstance(n := page.get("units"), int) and len(units) < n:
        words.append(f"not done: {len(units)} of {n} units are there")
    return (f"swept: {', '.join(words)}",)


def _file(path: Path, name: str, page: dict[str, Any] | None) -> File:
    size = size_of(path / name)
    try:
        tensors = TensorFile(inside(path, name))
        head = json.loads(tensors.metadata["mechjax"])
        digest, called = _FORMATS[head["format"]]
        arrays = {key: tensors[key] for key in tensors.entries}
        if digest(arrays) != head["sha256"]:
            return File(name, size, "was changed: the checksum of its numbers differs", tuple(arrays))
        is_it = head["unit"] == called(name) and list(head) == ["format", "unit", "specification", "sha256"]
        is_told = tensors.metadata == {"mechjax": json.dumps(head)}
    except CheckpointError as error:
        return File(name, size, told(error, path), ("the header",))
    except (KeyError, TypeError, ValueError, RecursionError):
        is_it = is_told = False
        head = {}
    if not is_it or not is_told:
        return File(
            name, size, "was changed, or is another unit's file: its name is not in it", ("the header",)
        )
    if page is not None and (head["specification"], head["format"]) != (page_digest(page), page["format"]):
        return File(name, size, "is of another sweep than the folder", ("the header",))
    return File(name, size)
