"""Checkpoints of training that `mechjax.fit` and `mechjax.dictlearn` wrote: a step, or a run's folder of steps."""

from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from mechjax.artefacts.found import File, Found, compared, joined, made_of, size_of, told
from mechjax.base.errors import CheckpointError
from mechjax.fit.checkpoint import BESIDE
from mechjax.fit.sums import differs, has_all_sums, own_files, read_sums, sums_files

_ORBAX = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "commit_success.txt", "ocdbt.process_0")
_FAILURES = (ValueError, OSError, RuntimeError, TypeError, KeyError, IndexError)


def is_step(path: Path) -> bool:
    """Whether a checkpoint of one step lies there, whatever of it is missing."""
    return bool(sums_files(path)) or sum((path / name).exists() for name in _ORBAX) > 1


def is_run(path: Path) -> bool:
    """Whether checkpoints of several steps lie there."""
    return bool(_steps(path))


def check_run(path: Path) -> Found:
    """Every step, one by one. A step without checksums was being written, and is none."""
    whole = [step for step in _steps(path) if has_all_sums(step)]
    begun = [step.name for step in _steps(path) if not has_all_sums(step)]
    found = joined(check_step(step).under(step.name) for step in whole)
    said = (
        f"step {', '.join(begun)}: no checksums, so no checkpoint; writing it broke off, or they were deleted"
    )
    if not whole:
        return Found((File("checksums.0-of-1.json", 0, f"is missing in {said}"),))
    return Found(found.files, found.provenance, (*found.notes, *((said,) if begun else ())))


def check_step(path: Path) -> Found:
    """Compare every file with its SHA-256; where one differs, or has none, every array with those of its parts."""
    pages: list[dict[str, Any]] = []
    files: list[File] = []
    for file in sums_files(path):
        try:
            pages.append(read_sums(file))
            files.append(File(file.name, size_of(file)))
        except (ValueError, CheckpointError) as error:
            files.append(File(file.name, size_of(file), told(error, path)))
    if not has_all_sums(path):
        files.append(
            File("checksums.*.json", 0, "is missing: of each process that wrote the step there is one")
        )
    listed = {name: sums for page in pages for name, sums in page.get("files", {}).items()}
    files += [compared(path, name, sums) for name, sums in listed.items()]
    if not pages:
        return Found(tuple(files))
    made, notes = made_of(pages[0])
    if not listed or any(file.problem for file in files):
        files = _with_arrays(path, pages, files)
    if listed and len(pages) == len(sums_files(path)) and (more := set(own_files(path)) - set(listed)):
        notes += (f"{len(more)} files were added later and are not part of it",)
    return Found(tuple(files), made, notes)


def _steps(path: Path) -> list[Path]:
    found = [step for step in path.iterdir() if step.name.isdecimal() and step.is_dir() and is_step(step)]
    return sorted(found, key=lambda step: int(step.name))


def _with_arrays(path: Path, pages: list[dict[str, Any]], files: list[File]) -> list[File]:
    """The files, with the arrays that are damaged at each that holds numbers and is."""
    wrong = tuple(dict.fromkeys(name for page in pages for name in _damaged(path, page["arrays"])))
    if not wrong:
        return files
    data = [i for i, file in enumerate(files) if file.problem and "d/" in file.name]
    for i in data:
        files[i] = File(files[i].name, files[i].size, files[i].problem, wrong)
    return files if data else [*files, File("arrays", 0, "are not what was written", wrong)]


def _damaged(path: Path, arrays: dict[str, Any]) -> list[str]:
    """The arrays of which a part is not what was written, read without a device."""
    return [name.removeprefix(BESIDE) for name, entry in arrays.items() if _differs(path, name, entry)]


def _differs(path: Path, name: str, entry: dict[str, Any]) -> bool:
    store = {"driver": "ocdbt", "base": f"file://{path.absolute()}/", "path": f"{name}/"}
    try:
        array = ts.open({"driver": "zarr", "kvstore": store}, open=True, read=True).result()
        read = lambda part: np.asarray(array[tuple(slice(*span) for span in part["at"])].read().result())
        whole = lambda part: {
            "at": [[0, stop - start] for start, stop in part["at"]],
            "sha256": part["sha256"],
        }
        return any(differs(whole(part), read(part)) for part in entry["parts"])
    except _FAILURES:
        return True
