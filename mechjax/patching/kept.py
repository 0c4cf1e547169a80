"""What a folder holds of a sweep, read without the model: `sweep.json` says what there is to be."""

import json
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from mechjax.base.digests import arrays_digest
from mechjax.base.errors import CheckpointError, SweepError
from mechjax.hub.tensor_file import DTYPES
from mechjax.models.room import out_of_memory
from mechjax.patching.grid import Grid, Unit
from mechjax.patching.scores import PatchScores
from mechjax.patching.sweep import shaped
from mechjax.workers import Store
from mechjax.workers.agree import SPECIFICATION, digest_of, specification_of
from mechjax.workers.lease import LEASES, read_lease
from mechjax.workers.turns import FAILED, QUARANTINE

FORMAT = "mechjax sweep 2"
RUNS, UNITS = "runs.safetensors", "unit-"


@dataclass(frozen=True)
class Kept:
    """A folder's sweep.

    Attributes:
        store: The folder.
        page: What `sweep.json` says.
        digest: Its checksum, which every file of the sweep repeats.
        units: What there is to be.
    """

    store: Store
    page: dict[str, Any]
    digest: str
    units: tuple[Unit, ...]

    @property
    def grid(self) -> Grid:
        """Its cells."""
        return _grid(self.page)

    def scores(self, unit: Unit) -> np.ndarray:
        """The scores of a unit. Shape (cell, batch).

        Raises:
            CheckpointError: It is not there, not whole, or was changed.
        """
        found = self._arrays(unit.name)
        return self._shaped(unit.name, found.get("scores"), (len(unit.cells), self.page["shape"][0]))

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """The metric of the donor run and of the base run. Each of shape (batch,).

        Raises:
            CheckpointError: As `scores`.
        """
        found, shape = self._arrays(RUNS), (self.page["shape"][0],)
        donor, base = (self._shaped(RUNS, found.get(name), shape) for name in ("donor", "base"))
        return donor, base

    def _arrays(self, name: str) -> dict[str, np.ndarray]:
        path, data = self.store.path(name), self.store.read(name).value
        if data is None:
            raise CheckpointError(
                f"`{path}` is missing: the sweep is not done. Run it again, and it goes on."
            )
        try:
            length = int.from_bytes(data[:8], "little")
            head = json.loads(data[8 : 8 + length])["__metadata__"]
            arrays = {
                key: np.frombuffer(found["data"], DTYPES[found["dtype"]]).reshape(found["shape"])
                for key, found in safetensors.deserialize(data)
            }
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"`{path}` is not whole: {error}. Delete it, and it is swept again."
            ) from error
        if head != _head(arrays, name, self.digest):
            raise self._changed(name)
        return arrays

    def _shaped(self, name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
        if array is None or array.shape != shape:
            raise self._changed(name)
        return array

    def _changed(self, name: str) -> CheckpointError:
        return CheckpointError(
            f"`{self.store.path(name)}` was changed after it was written, or is of another sweep. Delete it, and it "
            "is swept again."
        )


def kept_in(store: Store) -> Kept | None:
    """The sweep of a folder; None where none was begun.

    Raises:
        CheckpointError: `sweep.json` is not whole, or of another version.
    """
    data, path = store.read(SPECIFICATION).value, store.path(SPECIFICATION)
    if data is None:
        return None
    page = specification_of(data, path)
    if page.get("format") != FORMAT:
        raise CheckpointError(
            f"`{path}` has the format {page.get('format')!r}, and this version of mechjax reads {FORMAT!r}. Read it "
            "with the version that wrote it, or sweep again in another folder."
        )
    try:
        units = tuple(_grid(page).units())
        right = len(units) == page["units"] and len(page["shape"]) == 2 and "site" in page and "mode" in page
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        units, right = (), False
    if not right:
        raise CheckpointError(f"`{path}` does not say what a sweep is. Sweep again in another folder.")
    return Kept(store, page, digest_of(page), units)


def scores_in(store: Store) -> PatchScores:
    """The record of a sweep that is done.

    Raises:
        CheckpointError: No sweep, or a file that is missing, not whole or changed.
        SweepError: Units that were set aside.
    """
    kept = kept_in(store)
    if kept is None:
        raise CheckpointError(f"`{store.place}` holds no `{SPECIFICATION}`: no sweep was begun there.")
    if failed := state_of(kept).failed:
        raise SweepError(_failures(kept, failed))
    page, grid = kept.page, kept.grid
    of_donor, of_base = kept.runs()
    cells, batch = len(grid.cells()), page["shape"][0]
    found = np.zeros((grid.layers or 1, cells, batch), of_base.dtype)
    for unit in kept.units:
        found[unit.layer or 0, unit.cells] = kept.scores(unit)
    per_example = shaped(grid, jnp.asarray(found))
    of_clean, of_corrupt = (of_donor, of_base)[:: 1 if page["mode"] == "denoise" else -1]
    labels = (("pos", tuple(page["positions"])),) if page["positions"] else ()
    return PatchScores(
        per_example.mean(-1), per_example, jnp.asarray(of_clean), jnp.asarray(of_corrupt), page["site"],
        grid.over, page["mode"], labels,
    )  # fmt: skip


@dataclass(frozen=True)
class State:
    """How far a sweep is.

    Attributes:
        done: Units that are there.
        leased: Unit -> who is at it, as far as leases tell: a worker that has died keeps its lease for a while.
        failed: Unit -> what it failed with; it was tried three times.
        left: Units that nobody is at.
        quarantined: Results that differ from what was there first.
    """

    done: tuple[str, ...] = ()
    leased: tuple[tuple[str, str], ...] = ()
    failed: tuple[tuple[str, str], ...] = ()
    left: tuple[str, ...] = ()
    quarantined: tuple[str, ...] = ()


def state_of(kept: Kept) -> State:
    """How far a sweep is: by names alone, but for leases and failures."""
    store, there = kept.store, set(kept.store.names())
    names = [unit.name for unit in kept.units]
    done = tuple(name for name in names if name in there)
    failed = tuple(
        (name, _error(store, f"{FAILED}{name}.json"))
        for name in names
        if f"{FAILED}{name}.json" in there and name not in there
    )
    settled = {*done, *dict(failed)}
    owners = {
        name: _owner(store, LEASES + name) for name in names if LEASES + name in there and name not in settled
    }
    leased = tuple((name, owner) for name, owner in owners.items() if owner is not None)
    left = tuple(name for name in names if name not in settled and name not in dict(leased))
    return State(done, leased, failed, left, tuple(sorted(k for k in there if k.startswith(QUARANTINE))))


def problems_of(kept: Kept) -> list[tuple[str, str]]:
    """What is wrong with a sweep's files, each with what: missing, damaged, doubled, not of the sweep."""
    there = set(kept.store.names())
    found: list[tuple[str, str]] = []
    checks = [(RUNS, kept.runs), *((u.name, lambda u=u: kept.scores(u)) for u in kept.units)]
    for name, check in checks:
        if name not in there:
            found.append((name, "missing"))
            continue
        try:
            check()
        except CheckpointError:
            found.append((name, "damaged"))
    known = {name for name, _ in checks}
    found += [(key, "doubled") for key in sorted(there) if key.startswith(QUARANTINE)]
    found += [(key, "not of this sweep") for key in sorted(there - known) if key.startswith(UNITS)]
    return found


def _failures(kept: Kept, failed: tuple[tuple[str, str], ...]) -> str:
    store, (first, error), chunk = kept.store, failed[0], kept.grid.chunk
    room = (
        f" Memory ran out: sweep in another folder with chunk_size={max(1, chunk // 2)}, half of this one's."
    )
    return (
        f"{len(failed)} of {len(kept.units)} units in `{store.place}` failed three times, and were set aside; the "
        f"first, `{first}`, with {error}. Tracebacks are in `{store.path(FAILED)}`: delete that folder to try again."
        + room
        * out_of_memory(RuntimeError(error))
    )


def packed(arrays: dict[str, np.ndarray], name: str, specification: str) -> bytes:
    """The file of a unit, the same bytes whoever writes it."""
    arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
    return safetensors.numpy.save(arrays, _head(arrays, name, specification))


def _head(arrays: dict[str, np.ndarray], name: str, specification: str) -> dict[str, str]:
    """What a file says of itself; one entry, as safetensors writes several in any order."""
    page = {"format": FORMAT, "unit": name, "specification": specification, "sha256": arrays_digest(arrays)}
    return {"mechjax": json.dumps(page)}


def _grid(page: dict[str, Any]) -> Grid:
    sizes, starts, over = (tuple(page[key]) for key in ("sizes", "starts", "over"))
    return Grid(page["layers"], over, sizes, starts, page["chunk_size"], page["shape"][1])


def _error(store: Store, key: str) -> str:
    try:
        return str(json.loads(store.read(key).value or b"")["error"])
    except (ValueError, KeyError, TypeError):
        return "an error that cannot be read"


def _owner(store: Store, key: str) -> str | None:
    value = store.read(key).value
    return None if value is None else read_lease(value).owner
