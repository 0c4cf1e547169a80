"""Many steps as one compiled program, fed with batches: what training one dictionary and many have in common."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
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
from mechjax.dictlearn.placement import kept_placed, placed, spread, spread_batches
from mechjax.dictlearn.plan import Plan
from mechjax.dictlearn.step import State, advanced

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
def advance(
    given: tuple[Plan, Float[Array, "..."], Array], batches: Stacked, state: State
) -> tuple[State, Measures]:
    """As many steps as there are batches; of many dictionaries, where the state has an axis for them.

    The batches of many dictionaries are their own where they have an axis for them, else they are shared.
    """
    plan, scale, done = given
    x, y = batches

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
class Watch:
    """What is told of a run, and what stops it.

    Attributes:
        called: What a progress bar says.
        not_finite: What to do with a batch that is not finite.
        metrics: A file for each step's measures.
        tracker: What else is told them.
    """

    called: str
    not_finite: NotFinite
    metrics: str | Path | None
    tracker: Tracker | None


def run(
    stream: Iterable[Stacked], plan: Plan, scale: Float[Array, "..."], state: State, watch: Watch, *,
    after: Callable[[State, int, Stacked, Measures], State], mesh: Mesh | None = None, own: bool = False,
    done: int = 0,
) -> State:  # fmt: skip
    """Every step.

    Args:
        stream: Stacks of batches.
        plan: What the run holds to.
        scale: What inputs and outputs are divided by. Shape (*many, 2, *site).
        state: Before the first step.
        watch: What is told, and what stops it.
        after: What is done after each stack: of the state, the steps that are done, the last batch and the measures.
        mesh: Where arrays lie; None for one device.
        own: Whether each of many dictionaries has batches of its own.
        done: Steps that were done before.

    Raises:
        ArgumentError: A batch that is not finite, where that stops a run.
        ShapeError: Batches that the mesh does not divide.
        WriteError: A file of metrics that cannot be written.
    """
    if mesh is not None:
        state = placed(state, plan.optimizer, mesh)
        scale = spread(scale, NamedSharding(mesh, PartitionSpec()))
    within = nullcontext if mesh is None else partial(jax.set_mesh, mesh)
    with bar(watch.called, int(plan.steps)) as progress:
        progress.advance(done)
        for stack in stream:
            x, y = stack
            part = stack if mesh is None else (spread_batches(x, mesh, own), spread_batches(y, mesh, own))
            last = part[0][-1], None if part[1] is None else part[1][-1]  # before the stack is given away
            with within():
                state, measured = advance((plan, scale, jnp.int32(done)), part, state)
                check_finite(measured, done, watch.not_finite)
                del measured["fine"]
                report(watch, measured, done)
                done += len(measured["loss"])
                state = after(state, done, last, measured)
            progress.advance(len(measured["loss"]))
    return state


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


def report(watch: Watch, measured: Measures, done: int) -> None:
    """Each step's measures, as lines of JSON and to a tracker; of several processes the first does it.

    Raises:
        WriteError: The file cannot be written.
    """
    path, tracker = watch.metrics, watch.tracker
    if (path is None and tracker is None) or jax.process_index():
        return
    columns = {name: np.asarray(values, np.float64) for name, values in measured.items()}
    rows = [
        {name: values[i].tolist() for name, values in columns.items()} for i in range(len(measured["loss"]))
    ]
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
