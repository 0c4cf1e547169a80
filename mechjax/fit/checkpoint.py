"""Checkpoints of a training run: one folder per step, written and read by Orbax."""

from pathlib import Path
from typing import TypeVar

import equinox as eqx
import jax
from jaxtyping import Array

from mechjax.base.errors import ArgumentError, CheckpointError

Model = TypeVar("Model")


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


def save_checkpoint(folder: str | Path, step: int, model: object) -> None:
    """Write the arrays of `model` to `folder/<step>`; an earlier checkpoint of that step is replaced."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(Path(folder).absolute() / str(step), _arrays(model), force=True)


def saved_steps(folder: str | Path) -> tuple[int, ...]:
    """The steps that have a checkpoint in `folder`, in order; none where there is no such folder."""
    folder = Path(folder)
    return tuple(sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())) if folder.is_dir() else ()


def restore_checkpoint(folder: str | Path, step: int, like: Model) -> Model:
    """The model saved at `step`, in the structure, shapes and dtypes of `like`.

    Raises:
        CheckpointError: No such step, or arrays that are not those of `like`.
    """
    import orbax.checkpoint as ocp

    if step not in saved_steps(folder):
        raise CheckpointError(
            f"`{folder}` has no checkpoint of step {step}; it has {list(saved_steps(folder))}."
        )
    arrays, rest = eqx.partition(like, eqx.is_array)
    wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in _arrays(like).items()}
    path = Path(folder).absolute() / str(step)
    with ocp.StandardCheckpointer() as checkpointer:
        saved = {
            name: (leaf.shape, leaf.dtype) for name, leaf in checkpointer.metadata(path).item_metadata.items()
        }
        differ = {name for name, leaf in wanted.items() if saved.get(name) != (leaf.shape, leaf.dtype)}
        if differ := sorted(differ | saved.keys() - wanted.keys()):
            raise CheckpointError(
                f"The checkpoint of step {step} in `{folder}` does not hold the arrays of `like`: they differ in "
                f"{', '.join(differ[:5])}. Pass a model of the config that was trained."
            )
        found = checkpointer.restore(path, wanted)
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), [found[name] for name in wanted]), rest)


def _arrays(model: object) -> dict[str, Array]:
    """Every array of `model` by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(model, eqx.is_array))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
