"""Checkpoints of a training run: one folder per step, written and read by Orbax.

Orbax tells a truncated file, not a changed one: of weights in which one bit was flipped, all came back as if nothing
had happened (tried on f32 and bf16). So each part of an array that a device holds has a checksum of its own here, and
so has each file (`sums`); a step counts from when these are written: what was killed before is no checkpoint.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from mechjax.base.atomic import replace_file
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.base.provenance import Provenance, placed, provenance_of
from mechjax.base.signed import signed
from mechjax.fit.sums import (
    FORMAT,
    differs,
    files_of,
    has_all_sums,
    is_held,
    read_sums,
    spans_of,
    sums_file,
    sums_of,
)

Model = TypeVar("Model")
BESIDE = "beside/"
"""What names of arrays begin with that were saved beside the model."""


@dataclass(frozen=True)
class Restored(Generic[Model]):
    """What a checkpoint holds.

    Attributes:
        model: The model.
        beside: Arrays that were saved beside it.
        about: What was said of it.
    """

    model: Model
    beside: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)


def log_spaced(steps: int, n: int) -> tuple[int, ...]:
    """`n` different steps from 0 to `steps`, both included, spread evenly in logarithm as far as whole steps allow.

    Raises:
        ArgumentError: Fewer than two, or more than there are.
    """
    if not 2 <= n <= steps + 1:
        raise ArgumentError(f"{n} checkpoints of {steps} steps: ask for 2 to {steps + 1}.")
    chosen = [0]
    for left in range(n - 1, 0, -1):  # each as far from the last as the remaining ones allow at an even ratio
        last = max(chosen[-1], 1)
        chosen.append(max(chosen[-1] + 1, round(last * (steps / last) ** (1 / left))))
    return tuple(chosen)


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: object,
    *,
    beside: Mapping[str, np.ndarray] | None = None,
    about: Mapping[str, Any] | None = None,
    made_from: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> None:
    """Write the arrays of `model` to `folder/<step>`; an earlier checkpoint of that step is replaced.

    Cost beside the writing: a SHA-256 over the arrays, and one over the files, which are read once for it.

    Args:
        folder: Of all steps of a run. Several processes that share a model all call this, with one folder.
        step: Which.
        model: Any pytree.
        beside: Arrays of any shapes, not known when they are read.
        about: What else is to be known, as JSON.
        made_from: What it was made from, as `mj.save` takes it; goes into its provenance.
        keep: How many of the newest steps stay; None for all.

    Raises:
        WriteError: It cannot be written, for want of room say; checkpoints that are there stay as they are.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).absolute()
    path = folder / str(step)
    arrays = _arrays(model) | {BESIDE + name: np.asarray(x) for name, x in (beside or {}).items()}
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _forget(path)
            for broken in folder.glob("*.orbax-checkpoint-tmp*"):  # of a process that was killed
                shutil.rmtree(broken)
        _meet(f"begin {step}")
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, arrays, force=True)
            checkpointer.wait_until_finished()
        page = {
            "format": FORMAT,
            "about": dict(about or {}),
            "arrays": {n: sums_of(x) for n, x in arrays.items()},
            "files": files_of(path),
            "provenance": _made(model, made_from or {}).page(),
        }
        replace_file(path / sums_file(), signed(page))
        _meet(f"saved {step}")
        for old in saved_steps(folder)[: -keep or None] if keep and jax.process_index() == 0 else ():
            _forget(folder / str(old))
    except (OSError, ValueError, RuntimeError) as error:  # the last two are how tensorstore's come through
        there = [old for old in saved_steps(folder) if old != step]
        raise WriteError(
            f"the checkpoint of step {step} cannot be written to `{folder}`: {_first_line(error)}. Make room, or give "
            f"another folder; whole there: {f'step {there[-1]}, from which a run goes on' if there else 'none'}."
        ) from error


def _made(model: object, made_from: Mapping[str, Any]) -> Provenance:
    """Where a checkpoint comes from; its arrays have their checksums beside it."""
    made = provenance_of(**made_from)
    return replace(made, made_from=(placed("saved", model), *made.made_from))


def saved_steps(folder: str | Path) -> tuple[int, ...]:
    """The steps that have a whole checkpoint in `folder`, in order; none where there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        return ()
    return tuple(sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and has_all_sums(p)))


def restore_checkpoint(folder: str | Path, step: int, like: Model) -> Model:
    """The model saved at `step`, in the structure, shapes, dtypes and shardings of `like`.

    Raises:
        CheckpointError: No such step, arrays that are not those of `like`, or that are not as they were written.
    """
    return restore_all(folder, step, like).model


def restore_all(folder: str | Path, step: int, like: Model) -> Restored[Model]:
    """The model saved at `step` as by `restore_checkpoint`, with what was saved beside it.

    Raises:
        CheckpointError: As for `restore_checkpoint`.
    """
    import orbax.checkpoint as ocp

    pages = _pages(folder, step)
    arrays, rest = eqx.partition(like, eqx.is_array)
    path = Path(folder).absolute() / str(step)
    saved = pages[0]["arrays"]
    wanted = {name: _shape(leaf) for name, leaf in _arrays(like).items()}
    own = {name for name in saved if not name.startswith(BESIDE)}
    told = lambda entry: None if entry is None else (tuple(entry["shape"]), entry["dtype"])
    differ = {name for name, leaf in wanted.items() if told(saved.get(name)) != (leaf.shape, str(leaf.dtype))}
    if differ := sorted(differ | own - wanted.keys()):
        raise CheckpointError(
            f"The checkpoint of step {step} in `{folder}` does not hold the arrays of `like`: they differ in "
            f"{', '.join(differ[:5])}. Pass a model of the config that was trained."
        )
    beside = {
        name: jax.ShapeDtypeStruct(entry["shape"], entry["dtype"])
        for name, entry in saved.items()
        if name.startswith(BESIDE)
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found: dict[str, Any] = checkpointer.restore(path, wanted | beside)
    except Exception as error:  # Orbax and tensorstore have many, of no common base
        raise _broken(path, f"it cannot be read ({_first_line(error)})") from error
    for page in pages:
        for name, entry in page["arrays"].items():
            held = spans_of(found[name])
            parts = [part for part in entry["parts"] if is_held(part, held)]
            if any(differs(part, found[name], held) for part in parts):
                raise _broken(
                    path, f"`{name.removeprefix(BESIDE)}` is not what was written: its checksum differs"
                )
    model = eqx.combine(
        jax.tree.unflatten(jax.tree.structure(arrays), [found[name] for name in wanted]), rest
    )
    return Restored(
        model, {name.removeprefix(BESIDE): np.asarray(found[name]) for name in beside}, pages[0]["about"]
    )


def said_of(folder: str | Path, step: int) -> dict[str, Any]:
    """What was said of a checkpoint when it was saved (`about`), without its arrays.

    Raises:
        CheckpointError: There is none, or what was said is not as it was written.
    """
    return _pages(folder, step)[0]["about"]


def _pages(folder: str | Path, step: int) -> list[dict[str, Any]]:
    """What each process wrote of its parts of a checkpoint."""
    if step not in saved_steps(folder):
        raise CheckpointError(
            f"`{folder}` has no checkpoint of step {step}; it has {list(saved_steps(folder))}."
        )
    return [_page(file) for file in sorted((Path(folder).absolute() / str(step)).glob("checksums.*.json"))]


def _arrays(model: object) -> dict[str, Array]:
    """Every array of `model` by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _meet(where: str) -> None:
    """Waits for all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None))


def _forget(path: Path) -> None:
    """Takes a step away, its checksums first: what is half gone is no checkpoint."""
    for file in path.glob("checksums.*.json"):
        file.unlink()
    if path.is_dir():
        shutil.rmtree(path)


def _page(file: Path) -> dict[str, Any]:
    """What was written of a step beside its arrays.

    Raises:
        CheckpointError: It cannot be read, was changed, or is of a later version.
    """
    try:
        return read_sums(file)
    except ValueError as error:
        raise _broken(file.parent, f"`{file.name}` {error}") from error


def _broken(path: Path, what: str) -> CheckpointError:
    others = [step for step in saved_steps(path.parent) if step != int(path.name)]
    onward = f"step {others[-1]}" if others else "the beginning"
    return CheckpointError(
        f"the checkpoint of step {path.name} in `{path.parent}` is broken: {what}. Remove the folder `{path.name}` to "
        f"go on from {onward}."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
