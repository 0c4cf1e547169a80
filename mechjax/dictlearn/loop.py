"""Many steps as one compiled program, fed with batches: what training one dictionary and many have in common."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError, WriteError
from mechjax.base.progress import bar
from mechjax.dictionaries import Dictionary
from mechjax.dictlearn.placement import kept_placed, placed, spread_batches
from mechjax.dictlearn.plan import Plan
from mechjax.dictlearn.step import State, advanced
from mechjax.parallel.last_words import last_words
from mechjax.parallel.shard import spread

Batch = Any
Stacked = tuple[Any, Any | None]
Measures = dict[str, Array]
NotFinite = Literal["abort", "skip"]
Tracker = Callable[[int, dict[str, Any]], None]
MANY = "dictionary"  # the mapped axis of many dictionaries


def chunks(
    batches: Iterable[Batch], read: tuple[int, ...], written: tuple[int, ...], steps: int, most: int, *,
    many: tuple[int, ...] = (), done: int = 0,
) -> Iterator[Stacked]:  # fmt: skip
    """Batches of at most `most` steps at a time, stacked.

    Args:
        batches: Arrays, or pairs of what is read and what is to be made of it.
        read: The shape of what is read of a token.
        written: The shape of what is made of it.
        steps: How many in all.
        most: How many at a time.
        many: The axis before the batch's, where each of many dictionaries has its own.
        done: Steps that were done before, of which no batches are given.

    Raises:
        ArgumentError: Too few.
        ShapeError: One of another shape.
    """
    stream, size = iter(batches), None
    while done < steps:
        some = [_pair(batch) for batch in islice(stream, min(most, steps - done))]
        if len(some) < min(most, steps - done):
            raise ArgumentError(
                f"`batches` ended after {done + len(some)} of {steps} steps: give one batch for each step, or fewer "
                "steps."
            )
        for i, (x, y) in enumerate(some):
            whole = x.ndim == len(many) + 1 + len(read)
            size = x.shape[len(many)] if size is None and whole else size
            _check(x, y, read, written, (*many, size), done + i)
        stack = np.stack if all(isinstance(x, np.ndarray) for x, _ in some) else jnp.stack
        xs, ys = zip(*some, strict=True)
        yield stack(xs), None if ys[0] is None else stack(ys)
        done += len(some)


def _pair(batch: Batch) -> tuple[Any, Any | None]:
    """What is read and what is to be made of it; None where that is the same."""
    return batch if isinstance(batch, tuple) else (batch, None)


def _check(
    x: Any, y: Any | None, read: tuple[int, ...], written: tuple[int, ...], lead: tuple[Any, ...], step: int
) -> None:
    """Whether a batch fits."""
    told = lambda shape: str((*lead, *shape)).replace("None", "batch")
    if x.shape != (*lead, *read):
        raise ShapeError(
            f"the batch of step {step + 1} has shape {x.shape}, and {told(read)} is what is read here: all batches of "
            "a run have one shape, or each would be compiled for."
        )
    if y is None and read != written:
        raise ShapeError(
            f"what is read has {read[-1]} numbers and what is made of it {written[-1]}: give pairs of both, as for a "
            "transcoder."
        )
    if y is not None and y.shape != (*lead, *written):
        raise ShapeError(
            f"the batch of step {step + 1} has a target of shape {y.shape}; it should be {told(written)}."
        )


@eqx.filter_jit(donate="all-except-first")
def advance(given: tuple[Plan, Float[Array, "..."], Array, Stacked], state: State) -> tuple[State, Measures]:
    """As many steps as there are batches; of many dictionaries, where the state has an axis for them.

    The batches of many dictionaries are their own where they have an axis for them, else they are shared.
    """
    plan, scale, done, (x, y) = given

    def step(carry: tuple[State, Array], batch: Stacked) -> tuple[tuple[State, Array], Measures]:
        state, done = carry
        if state.skipped.ndim == 0:
            state, measured = _one(state, scale, *batch, plan, done)
        else:
            own = [None if z is None or z.ndim == scale.ndim else 0 for z in batch]
            axes = (eqx.if_array(0), 0, *own, None, None, None)
            many: Any = eqx.filter_vmap(_one, in_axes=axes, axis_name=MANY)
            state, measured = many(state, scale, *batch, plan, done, MANY)
        return (kept_placed(state, plan.optimizer), done + 1), measured

    (state, _), measured = lax.scan(step, (state, done), (x, y))
    return state, measured


@dataclass(frozen=True)
class Group:
    """Dictionaries that one compiled call moves on: one, or several of one kind and size with an axis in front.

    Attributes:
        members: Which of all dictionaries they are; a whole number for one without the axis.
        scale: What inputs and outputs are divided by. Shape (*many, 2, *site).
        state: What a step changes.
    """

    members: int | tuple[int, ...]
    scale: Float[Array, "..."]
    state: State

    def batches(self, z: Any, own: bool) -> Any:
        """Of a stack of batches those of the members, where each dictionary has its own."""
        every = isinstance(self.members, tuple) and len(self.members) == (
            z.shape[1] if own and z is not None else 0
        )
        return z if z is None or not own or every else z[:, np.asarray(self.members)]

    def apart(self, measured: Measures) -> list[tuple[int, Measures]]:
        """Each member's number, and its measures."""
        if isinstance(self.members, int):
            return [(self.members, measured)]
        return [(n, {name: x[:, i] for name, x in measured.items()}) for i, n in enumerate(self.members)]


@dataclass(frozen=True)
class Watch:
    """What is told of a run, and what stops it.

    Attributes:
        called: What a progress bar says.
        not_finite: What to do with a batch that is not finite.
        metrics: A file for each step's measures.
        tracker: What else is told them.
        checkpoints: Where the run is kept.
    """

    called: str
    not_finite: NotFinite
    metrics: str | Path | None
    tracker: Tracker | None
    checkpoints: str | Path | None = None

    @property
    def farewell(self) -> str:
        """What to say where a run of several processes is ended from outside."""
        if self.checkpoints is None:
            return "Nothing was kept of the training: give `checkpoints=`."
        where = f"What was kept lies in `{self.checkpoints}`"
        return f"{where}: start all processes again as before, and they go on from there."


def run(
    stream: Iterable[Stacked], plan: Plan, groups: Sequence[Group], watch: Watch, *,
    after: Callable[[tuple[Group, ...], int, Stacked, list[Measures]], tuple[Group, ...]],
    mesh: Mesh | None = None, own: bool = False, done: int = 0,
) -> tuple[Group, ...]:  # fmt: skip
    """Every step.

    Args:
        stream: Stacks of batches.
        plan: What the run holds to.
        groups: What is trained, before the first step.
        watch: What is told, and what stops it.
        after: What is done after each stack: of the groups, the steps that are done, the last batch, and each group's
            measures.
        mesh: Where arrays lie; None for one device.
        own: Whether each dictionary has batches of its own.
        done: Steps that were done before.

    Raises:
        ArgumentError: A batch that is not finite, where that stops a run.
        ShapeError: Batches that the mesh does not divide.
        WriteError: A file of metrics that cannot be written.
    """
    within = nullcontext if mesh is None else partial(jax.set_mesh, mesh)
    held = tuple(group if mesh is None else _placed(group, plan, mesh) for group in groups)
    with bar(watch.called, int(plan.steps)) as progress, last_words(watch.farewell):
        progress.advance(done)
        for x, y in stream:
            part = (x, y) if mesh is None else (spread_batches(x, mesh, own), spread_batches(y, mesh, own))
            moved, told = [], []
            with within():
                for group in held:
                    given = tuple(group.batches(z, own) for z in part)
                    state, measured = advance((plan, group.scale, jnp.int32(done), given), group.state)
                    moved.append(replace(group, state=state))
                    told.append(measured)
                for measured in told:
                    check_finite(measured, done, watch.not_finite)
                    del measured["fine"]
                report(watch, held, told, done)
                done += len(x)
                held = after(
                    tuple(moved), done, (part[0][-1], None if part[1] is None else part[1][-1]), told
                )
            progress.advance(len(x))
    return held


def _placed(group: Group, plan: Plan, mesh: Mesh) -> Group:
    scale = spread(group.scale, NamedSharding(mesh, PartitionSpec()))
    return replace(group, scale=scale, state=placed(group.state, plan.optimizer, mesh))


def joined(recorded: Sequence[Measures]) -> Measures:
    """Measures of all steps, one after the other."""
    return {name: jnp.concatenate([entry[name] for entry in recorded]) for name in recorded[0]}


def _one(
    state: State, scale: Array, x: Array, y: Array | None, plan: Plan, done: Array, mapped: str | None = None
) -> tuple[State, Measures]:
    return advanced(state, plan, *sides(x, y, scale, state.dictionary), done, mapped)


def sides(
    x: Any, y: Any | None, scale: Float[Array, "2 *site"], dictionary: Dictionary
) -> tuple[Array, Array]:
    """What is read and what is to be made of it, in the units of training, as the dictionary takes it.

    What has several sites and is read by a dictionary of one (a crosscoder's) has them side by side.
    """

    def side(z: Any, by: Array) -> Array:
        z = jnp.asarray(z) / by.astype(z.dtype)[..., None]
        return z.reshape(len(z), -1) if dictionary.b_dec.ndim == 1 else z

    read = side(x, scale[0])
    return read, read if y is None else side(y, scale[1])


def check_finite(measured: Measures, done: int, not_finite: NotFinite) -> None:
    """Stops a run at a batch that is not finite, where that is asked for.

    Raises:
        ArgumentError: There was one.
    """
    fine = np.asarray(measured["fine"])
    if not_finite == "skip" or fine.all():
        return
    first = int(np.argmin(fine.reshape(len(fine), -1).all(-1)))
    raise ArgumentError(
        f"the batch of step {done + first + 1} holds numbers that are not finite, or makes such: nothing was changed "
        "by it. Look at that batch; to leave such batches out and count them, not_finite='skip'."
    )


def report(watch: Watch, groups: Sequence[Group], told: Sequence[Measures], done: int) -> None:
    """Each step's measures, as lines of JSON and to a tracker; of several processes the first does it.

    Raises:
        WriteError: The file cannot be written.
    """
    path, tracker = watch.metrics, watch.tracker
    if (path is None and tracker is None) or jax.process_index():
        return
    rows = list(_rows(groups, told))
    if tracker is not None:
        for i, row in enumerate(rows):
            tracker(done + i + 1, row)
    if path is None:
        return
    known = lambda value: (
        [known(x) for x in value] if isinstance(value, list) else value if np.isfinite(value) else None
    )
    tidy = lambda row: {name: known(value) for name, value in row.items()}
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({"step": done + i + 1, **tidy(row)}) + "\n" for i, row in enumerate(rows)
            )
    except OSError as error:
        raise WriteError(
            f"cannot add metrics to {path}: {error.strerror}. Give a file that can be written."
        ) from error


def _rows(groups: Sequence[Group], told: Sequence[Measures]) -> Iterator[dict[str, Any]]:
    """For each step its measures: of many dictionaries lists in their order, NaN where one has no such measure."""
    apart = sorted(
        (x for group, y in zip(groups, told, strict=True) for x in group.apart(y)), key=lambda x: x[0]
    )
    columns = [{name: np.asarray(values, np.float64) for name, values in own.items()} for _, own in apart]
    alone = len(groups) == 1 and isinstance(groups[0].members, int)
    for i in range(len(columns[0]["loss"])):
        names = dict.fromkeys(name for own in columns for name in own)
        every = {name: [own[name][i].item() if name in own else np.nan for own in columns] for name in names}
        yield {name: values[0] for name, values in every.items()} if alone else every
