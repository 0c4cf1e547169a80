"""A sweep in a folder: cut into units, each a file, so that what is killed goes on where it was, and many share it.

`sweep.json`, written first, says what is swept; a folder of another sweep is refused. A unit is a chunk of cells of
one group, and its file follows from its number alone: `unit-000012.safetensors`, with the scores, their checksum and
that of the specification. Files appear whole or not at all and are never changed. Which process does which unit is
settled by leases (`mechjax.workers`), so several may fill one folder; `runs.safetensors` has the metric of both runs.
"""

import contextlib
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError
from mechjax.base.progress import bar
from mechjax.base.whole import whole
from mechjax.patching.kept import FORMAT, RUNS, UNITS, kept_in, packed, scores_in
from mechjax.patching.planned import Planned
from mechjax.patching.scores import PatchScores
from mechjax.patching.sweep import Sweep
from mechjax.patching.whole_runs import WholeSweep
from mechjax.transform.select import is_concrete
from mechjax.workers import (
    ALONE,
    Sharing,
    Store,
    Team,
    Worked,
    check_sharing,
    opened,
    team_of_processes,
    work,
)
from mechjax.workers.agree import agree
from mechjax.workers.turns import left


def begun_in(folder: str | os.PathLike[str]) -> tuple[Store, int | None]:
    """The folder or bucket of a sweep, and how many cells run at once in the sweep that was begun there, if any.

    Raises:
        ArgumentError: Storage that is not known, or that cannot be shared by leases.
        CheckpointError: `sweep.json` is not whole.
    """
    store = opened(folder)
    check_sharing(store, Sharing())
    kept = kept_in(store)
    return store, None if kept is None else kept.grid.chunk


def swept_in(store: Store, plan: Planned) -> PatchScores:
    """Scores of every cell, done together with whoever else does them; goes on where it was.

    Raises:
        ArgumentError: The folder of another sweep (what differs is named), a sweep inside `jit`, or a run whose
            activations are not finite: before anything is swept.
        CheckpointError: A file that is not whole, or was changed.
        SweepError: Units that failed three times.
        WriteError: The folder cannot be written.
    """
    fill(store, plan, sharing=Sharing())
    found = scores_in(store)
    plan.sweep.check(found.clean, found.corrupt, found.scores)
    return found


def fill(
    store: Store,
    plan: Planned,
    *,
    sharing: Sharing,
    waits: bool = True,
    shift: int = 0,
    model: str | None = None,
) -> Worked:
    """Do units of a sweep until none is left to do.

    Args:
        store: Where they are.
        plan: What is swept.
        sharing: How they are shared with other workers.
        waits: Whether to stay until the units of other workers are done too.
        shift: Added to units' numbers where these say whose they are.
        model: Checksum of the model, where it is known.

    Raises:
        ArgumentError: As `swept_in`.
        CheckpointError: `sweep.json` is not whole.
        WriteError: The folder cannot be written.
    """
    sweep = plan.sweep
    if not all(map(is_concrete, jax.tree.leaves(sweep))):
        raise ArgumentError(
            f"A sweep inside `jit` or `vmap` cannot write to `folder={store.place!r}`: call it outside, or leave "
            "`folder` out."
        )
    check_sharing(store, sharing)
    every = sweep.grid.units()
    specification = agree(store, _specification(plan, len(every), model), units=UNITS)
    names, team = [unit.name for unit in every], _team_of(sweep)
    there = len(names) - len(left(store, names))
    if team.told(int(there == len(names) and RUNS in store)):
        return Worked()
    runs: Any = sweep.prepare()
    of_donor, of_base = whole(runs.of_donor), whole(runs.of_base)
    sweep.check(jnp.asarray(of_base), jnp.asarray(of_donor))
    if team.first and RUNS not in store:
        data = packed({"donor": of_donor, "base": of_base}, RUNS, specification)
        store.write(RUNS, data, over=store.read(RUNS))
    places = sweep.grid.cells()

    def do(index: int) -> bytes:
        unit = every[index]
        cells = places[unit.cells[np.arange(unit.size).clip(max=len(unit.cells) - 1)]]
        layer = None if unit.layer is None else jnp.int32(unit.layer)
        scores = whole(sweep.scores_of(runs, layer, jnp.asarray(cells), unit.start))
        return packed({"scores": scores[: len(unit.cells)]}, unit.name, specification)

    what = f"Patching {sweep.site}"
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(bar(what, len(names))) if team.first else None
        shown = 0

        def settled(n: int, of: int) -> None:
            nonlocal shown
            if progress is not None and (n := n + len(names) - of) > shown:
                progress.advance(n - shown)
                shown = n

        if progress is not None and there:
            settled(there, len(names))
        if progress is not None:
            progress.begin(what)
        return work(store, names, do, sharing=sharing, team=team, waits=waits, shift=shift, settled=settled)


def _team_of(sweep: Sweep | WholeSweep) -> Team:
    """The processes that hold the sweep's arrays together; this one alone where it has all of them."""
    arrays = (x for x in jax.tree.leaves(sweep) if isinstance(x, jax.Array))
    return ALONE if all(x.is_fully_addressable for x in arrays) else team_of_processes()


def _specification(plan: Planned, n_units: int, model: str | None) -> dict[str, Any]:
    """What is swept, and how."""
    sweep, grid = plan.sweep, plan.sweep.grid
    own = sweep.said(model)
    clean, corrupt = ("donor", "base")[:: 1 if plan.mode == "denoise" else -1]
    named = dict(zip(plan.names, whole(sweep.named).tolist(), strict=True)) if plan.names else None
    return {
        "format": FORMAT,
        "model": own["model"],
        "clean": own[clean],
        "corrupt": own[corrupt],
        "metric": own["metric"],
        "site": sweep.site,
        "over": list(sweep.over),
        "mode": plan.mode,
        "positions": named,
        "chunk_size": sweep.chunk,
        "starts": list(grid.starts),
        "layers": grid.layers,
        "sizes": list(grid.sizes),
        "shape": own["shape"],
        "units": n_units,
    }
