"""A sweep in a folder: cut into units, each a file, so that what is killed goes on where it was.

`sweep.json`, written first, says what is swept; a folder of another sweep is refused. A unit is a chunk of cells of
one group, and its file follows from its number alone: `unit-000012.safetensors`, with the scores, their checksum and
that of the specification. Files appear whole or not at all and are never changed, so several processes may fill one
folder.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import Array, Float, Int

from mechjax.base.digests import tree_digest
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.base.progress import bar
from mechjax.base.records import replace_file
from mechjax.patching.finite import check_numbers
from mechjax.patching.sweep import Sweep, even, prepare, scores_of, shaped
from mechjax.transform.select import is_concrete

_FORMAT = "mechjax sweep 1"


@dataclass(frozen=True)
class Unit:
    """Cells that run at once.

    Attributes:
        index: Its number, from 0.
        layer: The layer that they edit; None for all.
        start: The first position that runs.
        cells: Which of the layer's cells.
        size: With how many cells it runs; the last of a group is filled up with repeats.
    """

    index: int
    layer: int | None
    start: int
    cells: Int[np.ndarray, " cell"]
    size: int

    @property
    def name(self) -> str:
        """The name of its file."""
        return f"unit-{self.index:06d}.safetensors"


def units(sweep: Sweep) -> list[Unit]:
    """All units of a sweep, in order."""

    def parts() -> Iterator[tuple[int | None, int, np.ndarray, int]]:
        for layer in sweep.layers or (None,):
            for start, cells in sweep.buckets():
                size = even(len(cells), sweep.size_of(start))[1]
                yield from ((layer, start, cells[i : i + size], size) for i in range(0, len(cells), size))

    return [Unit(i, *part) for i, part in enumerate(parts())]


def swept_in(
    folder: Path, sweep: Sweep, *, mode: str, names: tuple[str, ...]
) -> tuple[Float[Array, "*over batch"], Float[Array, " batch"], Float[Array, " batch"]]:
    """Scores of every cell, per example, and the metric of the donor run and of the base run; goes on where it was.

    Args:
        folder: Where units are; made if it is not there.
        sweep: What is swept.
        mode: As the caller named the runs.
        names: The named positions.

    Raises:
        ArgumentError: The folder of another sweep (what differs is named), a sweep inside `jit`, or a run whose
            activations are not finite: before anything is swept.
        CheckpointError: A file that is not whole, or was changed.
        WriteError: The folder cannot be written.
    """
    if not all(map(is_concrete, jax.tree.leaves(sweep))):
        raise ArgumentError(
            f"A sweep inside `jit` or `vmap` cannot write to `folder={str(folder)!r}`: call it outside, or leave "
            "`folder` out."
        )
    specification = _digest_of(_specify(folder, _specification(sweep, mode, names)))
    every, runs, places = units(sweep), prepare(sweep), sweep.cells()
    check_numbers(sweep.model, (sweep.base, sweep.donor), sweep.mask, runs.of_base, runs.of_donor)
    todo = [unit for unit in every if not (folder / unit.name).exists()]
    what = f"Patching {sweep.site}"
    with bar(what, len(every)) as progress:
        progress.advance(len(every) - len(todo))
        progress.begin(what)
        for unit in todo:
            cells = places[unit.cells[np.arange(unit.size).clip(max=len(unit.cells) - 1)]]
            layer = None if unit.layer is None else jnp.int32(unit.layer)
            scores = np.asarray(scores_of(sweep, runs, layer, jnp.asarray(cells), unit.start))
            _write(folder / unit.name, _packed(scores[: len(unit.cells)], unit, specification))
            progress.advance()
    scores = np.zeros((len(sweep.layers or (None,)), len(places), len(sweep.at)), runs.of_base.dtype)
    for unit in every:
        shape = (len(unit.cells), len(sweep.at))
        scores[unit.layer or 0, unit.cells] = _read(folder / unit.name, unit, specification, shape)
    return shaped(sweep, jnp.asarray(scores)), runs.of_donor, runs.of_base


def _specification(sweep: Sweep, mode: str, names: tuple[str, ...]) -> dict[str, Any]:
    """What is swept: as it is where it is short, else its checksum."""
    clean, corrupt = (sweep.donor, sweep.base)[:: 1 if mode == "denoise" else -1]
    positions = dict(zip(names, np.asarray(sweep.named).tolist(), strict=True)) if names else None
    return {
        "format": _FORMAT,
        "model": tree_digest(sweep.model),
        "clean": tree_digest((clean, sweep.mask)),
        "corrupt": tree_digest((corrupt, sweep.mask)),
        "metric": f"{type(sweep.metric).__qualname__} {tree_digest(sweep.metric)}",
        "site": sweep.site,
        "over": list(sweep.over),
        "mode": mode,
        "positions": positions,
        "chunk_size": sweep.chunk,
        "starts": list(sweep.starts),
    }


def _specify(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Write the specification, or compare it with the one that is there."""
    path = folder / "sweep.json"
    if not path.exists():
        if next(folder.glob("unit-*.safetensors"), None) is not None:
            raise CheckpointError(
                f"`{folder}` holds units, but no `sweep.json` that says of which sweep. Choose another folder."
            )
        _write(path, json.dumps({**wanted, "sha256": _digest_of(wanted)}, indent=1).encode())
        return wanted
    try:
        found: Any = json.loads(path.read_bytes())
        whole = isinstance(found, dict) and found.pop("sha256", None) == _digest_of(found)
    except (OSError, ValueError):
        found, whole = {}, False
    if not whole:
        raise CheckpointError(
            f"`{path}` is not whole, or was changed: its checksum differs. Choose another folder, or delete it to "
            "sweep again."
        )
    differs = [
        f"`{name}` is {_brief(found.get(name))} there and {_brief(wanted.get(name))} here"
        for name in (*wanted, *(found.keys() - wanted.keys()))
        if found.get(name) != wanted.get(name)
    ]
    if differs:
        raise ArgumentError(
            f"`{folder}` holds another sweep: {'; '.join(differs)}. Go on with what it was begun with, or choose "
            "another folder."
        )
    return wanted


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 33 else f"{text[:29]}...{text[-1]}"


def _digest_of(page: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def _packed(scores: np.ndarray, unit: Unit, specification: str) -> bytes:
    """The file of a unit, the same bytes whoever writes it."""
    return safetensors.numpy.save({"scores": scores}, _head(scores, unit, specification))


def _head(scores: np.ndarray, unit: Unit, specification: str) -> dict[str, str]:
    """What a unit's file says of itself; one entry, as safetensors writes several in any order."""
    page = {
        "format": _FORMAT,
        "unit": unit.index,
        "specification": specification,
        "sha256": tree_digest(scores),
    }
    return {"mechjax": json.dumps(page)}


def _read(path: Path, unit: Unit, specification: str, shape: tuple[int, int]) -> np.ndarray:
    """The scores of a unit's file, checked."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            head, scores = file.metadata() or {}, file.get_tensor("scores")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"`{path}` is not whole: {error}. Delete it, and it is swept again.") from error
    if head != _head(scores, unit, specification) or scores.shape != shape:
        raise CheckpointError(
            f"`{path}` was changed after it was written, or is of another sweep. Delete it, and it is swept again."
        )
    return scores


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise WriteError(
            f"cannot write `{path}`: {error.strerror or error}. Choose a folder that can be written."
        ) from error
