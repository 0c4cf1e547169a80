"""Runs that can be killed at any moment and go on to the same weights, bit for bit.

A checkpoint holds what a step depends on: parameters, the optimiser's moments, silence, the controller, the data's
scale, the steps that are done, what the stream of batches has come to, and what was measured so far. It is written at
the ends of compiled calls, so that a run that goes on is cut into the same programs as one that was never stopped.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.atomic import replace_file
from mechjax.base.digests import tree_digest
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.dictionaries import Dictionary
from mechjax.dictlearn.loop import Measures, joined
from mechjax.dictlearn.plan import ADAM, UNIT_ADAM, Plan
from mechjax.dictlearn.step import State
from mechjax.fit import restore_all, said_of, save_checkpoint, saved_steps

KEEP = 2  # checkpoints that stay: the newest, and one before it should that be found broken
_STREAM, _HISTORY = "stream.", "history."


@runtime_checkable
class Resumable(Protocol):
    """A stream of batches that can be gone on with."""

    def state(self) -> Mapping[str, np.ndarray]:
        """What it has come to."""
        ...

    def resume(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from there, as a stream that was made in the same way."""
        ...


@dataclass(frozen=True)
class Keeper:
    """Where a run's checkpoints are, and which run it is.

    Attributes:
        folder: Of the checkpoints.
        every: Steps between them.
        per_call: Steps of one compiled call.
        run: What the run is, by name: what differs is another run, which is refused.
    """

    folder: Path
    every: int
    per_call: int
    run: Mapping[str, Any]

    def newest(self) -> int | None:
        """The last step that was kept; None for a run that begins."""
        return max(saved_steps(self.folder), default=None)

    def restore(
        self, step: int, state: State, scale: Float[Array, "..."]
    ) -> tuple[State, Float[Array, "..."], Measures, dict[str, np.ndarray]]:
        """What was kept at a step: state, scale, what was measured, and the stream's state.

        Args:
            step: One that was kept.
            state: One of the same shapes and placement.
            scale: One of the same shape.

        Raises:
            CheckpointError: Of another run, or not as it was written.
        """
        saved = said_of(self.folder, step)["run"]
        differ = sorted(
            name for name in saved.keys() | self.run.keys() if saved.get(name) != self.run.get(name)
        )
        if differ:
            told = ", ".join(f"{name} was {saved.get(name)} and is {self.run.get(name)}" for name in differ)
            raise CheckpointError(
                f"`{self.folder}` holds another run: {told}. Go on with what it was begun with, or give a new folder."
            )
        found = restore_all(self.folder, step, (state, scale))
        part = lambda prefix: {
            name.removeprefix(prefix): x for name, x in found.beside.items() if name.startswith(prefix)
        }
        history = {name: jnp.asarray(x) for name, x in part(_HISTORY).items()}
        return *found.model, history, part(_STREAM)

    def due(self, done: int, steps: int) -> bool:
        """Whether to keep the run after so many steps."""
        return done == steps or (done % self.per_call == 0 and done % self.every < self.per_call)

    def save(
        self, done: int, state: State, scale: Float[Array, "..."], recorded: Sequence[Measures], batches: Any
    ) -> None:
        """Keep the run after so many steps.

        Raises:
            WriteError: It cannot be written.
        """
        beside = {_HISTORY + name: np.asarray(x) for name, x in joined(recorded).items()}
        if isinstance(batches, Resumable):
            beside |= {_STREAM + name: np.asarray(x) for name, x in batches.state().items()}
        data = {"batches": batches} if isinstance(getattr(batches, "digest", None), str) else {}
        save_checkpoint(
            self.folder, done, (state, scale), beside=beside, about={"run": dict(self.run)},
            made_from=dict(self.run) | data, keep=KEEP,
        )  # fmt: skip


def keeper(
    folder: str | Path | None, every: int, per_call: int, dictionary: Dictionary, plan: Plan, **more: Any
) -> Keeper | None:
    """What keeps a run, if anything does.

    Args:
        folder: Where; None for nowhere.
        every: Steps between checkpoints.
        per_call: Steps of one compiled call.
        dictionary: What the run begins with.
        plan: What it holds to.
        **more: What else it depends on, as JSON.

    Raises:
        ArgumentError: No steps between checkpoints.
    """
    if folder is None:
        return None
    if every < 1:
        raise ArgumentError(f"save_every={every}: give a number of steps, 1 or more.")
    numbers = {name: value for name, value in vars(plan).items() if name != "optimizer"}
    run = {name: None if value is None else float(f"{float(value):.7g}") for name, value in numbers.items()}
    run |= {"dictionary": tree_digest(dictionary)[:16], "steps_per_call": per_call}
    run |= {"optimizer": {ADAM: "adam", UNIT_ADAM: "adam of unit gradients"}.get(plan.optimizer, "own")}
    return Keeper(Path(folder), every, per_call, json.loads(json.dumps(run | more)))


def gone_on(batches: Iterable[Any], done: int, state: Mapping[str, np.ndarray]) -> Iterator[Any]:
    """Batches after those of the steps that are done.

    Raises:
        ArgumentError: There are not so many.
        CheckpointError: A stream whose source ends before.
    """
    stream = iter(batches)
    if isinstance(batches, Resumable) and state:
        batches.resume(state)
        return stream
    if (passed := sum(1 for _ in islice(stream, done))) < done:
        raise ArgumentError(
            f"{done} steps were done before, and `batches` ended after {passed}: give the batches that the run was "
            "begun with, from the first on."
        )
    return stream


def trimmed(path: str | Path | None, done: int) -> None:
    """A file of metrics without what was told of later steps: they are done again.

    Raises:
        WriteError: It cannot be written.
    """
    if path is None or jax.process_index() or not Path(path).exists():
        return
    try:
        lines = Path(path).read_text("utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
        if kept != lines:
            replace_file(Path(path).absolute(), "".join(kept).encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WriteError(
            f"{path} holds lines that are no metrics of a run ({type(error).__name__}), or cannot be written: move it "
            "away, or give another file."
        ) from error
