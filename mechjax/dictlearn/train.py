"""Train dictionaries of activations.

Many steps are one compiled program: batches of a call are stacked and scanned over, buffers are given away and come
back, and nothing is read on the host between. The data are divided by their root mean square, for which coefficients
are meant, and the scale is folded back into the dictionary that is returned.

Cost: for each batch of B tokens and k active latents of F about 2 d F B + 8 d k B operations and 56 d F bytes of Adam,
or 10 d F B where latents are many (`mechjax.dictionaries.products`). Misleads when: a low error is taken for the right
latents; compare seeds (`train_many`), and look at what they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.dictionaries import Crosscoder, Dictionary
from mechjax.dictlearn.kept import Keeper, gone_on, keeper, trimmed
from mechjax.dictlearn.loop import (
    Batch,
    Group,
    Measures,
    NotFinite,
    Stacked,
    Tracker,
    Watch,
    chunks,
    joined,
    run,
    sides,
)
from mechjax.dictlearn.placement import fitting, placed
from mechjax.dictlearn.plan import DEAD_AFTER, Plan, planned
from mechjax.dictlearn.resample import resampled
from mechjax.dictlearn.start import begin
from mechjax.dictlearn.step import State, begun, turned
from mechjax.parallel.shard import spread


class Training(Record):
    """A trained dictionary, and how it came about.

    Attributes:
        step: Which step each entry belongs to, from 1.
        history: Name -> its value at each entry: "loss", "fvu" (of the batch), "l0", "dead" latents, "grad_norm",
            "sparsity_scale", and what the kind adds to its loss.
        dictionary: In the units of the data as they were given.
        silent: For each latent the tokens since it was last active.
        skipped: Batches that were left out as not finite.
        scale: What inputs and outputs were divided by, each site by itself.
    """

    step: Int[Array, "entry"]
    history: dict[str, Float[Array, "entry"]]
    dictionary: Dictionary | Crosscoder
    silent: Int[Array, "*layer feature"]
    skipped: Int[Array, ""]
    scale: Float[Array, "side *site"]


@on_any_mesh
def train(
    dictionary: Dictionary | Crosscoder,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    key: Key[Array, ""] | Array,
    warm_up: int = 0,
    decay: float = 1 / 3,
    sparsity_warm_up: float = 0.05,
    target_l0: float | None = None,
    dead_after: int = DEAD_AFTER,
    resample_at: Sequence[int] = (),
    normalize: bool = True,
    centre: bool = True,
    not_finite: NotFinite = "abort",
    unit_gradients: bool = True,
    optimizer: optax.GradientTransformation | None = None,
    steps_per_call: int = 20,
    metrics: str | Path | None = None,
    tracker: Tracker | None = None,
    mesh: Mesh | None = None,
    checkpoints: str | Path | None = None,
    save_every: int = 1000,
) -> Training:
    """Minimise a dictionary's loss over batches of activations.

    Args:
        dictionary: Where training begins, for data of mean square 1; it is left as it is. To go on with one that was
            trained, and so is in the data's own units, `normalize=False, centre=False`.
        batches: One array (batch, d_model) for each step, or for a transcoder pairs of what is read and what is to be
            made of it; (batch, site, d_model) for a crosscoder, (batch, layer, d_model) for a transcoder across
            layers. All of one shape.
        steps: How many.
        learning_rate: Its peak.
        key: Draws what resampling draws.
        warm_up: Steps over which the learning rate grows to its peak.
        decay: Over which last part of the run it falls to 0, linearly.
        sparsity_warm_up: Over which first part of the run the coefficient of sparsity grows to its value.
        target_l0: Active latents of a token to steer the coefficient to; None leaves it.
        dead_after: Tokens without activity after which a latent is dead.
        resample_at: After which steps dead latents are begun anew (Bricken et al. 2023).
        normalize: Whether to divide the data by their root mean square, each site by its own, and fold it back.
        centre: Whether to set biases to the middle of the first batches.
        not_finite: What to do with a batch that holds NaN or makes one: "abort", or "skip" it and count.
        unit_gradients: Whether Adam is told each gradient's direction alone (`plan` says why).
        optimizer: In place of Adam and of unit gradients, with a schedule of its own.
        steps_per_call: Steps of one compiled call.
        metrics: A file to which each step's measures are added, one line of JSON for each.
        tracker: Called with each step's number and measures, for a tracker of experiments.
        mesh: Splits latents over its axis `model` and tokens over `data` (`mj.make_mesh`); each device then holds
            1/model of every matrix. Where several processes share it, each gives the same batches.
        checkpoints: A folder in which the run is kept, to go on from when this is called again with the same
            arguments: to the same weights, bit for bit, on as many devices. Batches are given from the first on, and
            those that are done with are passed over; a stream of `activations` or of a store is put where it was.
        save_every: Steps between checkpoints, in whole compiled calls; the last step is kept too.

    Returns:
        The trained dictionary, with the history.

    Raises:
        ArgumentError: Numbers outside their range, too few batches, one that is not finite, or a mesh that does not
            divide the latents.
        ShapeError: Batches of another width, or of changing shape.
        CheckpointError: A checkpoint of another run, or one that is broken.
        WriteError: A file of metrics or a checkpoint that cannot be written.
    """
    plan = planned(
        steps, steps_per_call, learning_rate, warm_up, decay, sparsity_warm_up, target_l0, dead_after, optimizer,
        unit_gradients,
    )  # fmt: skip
    mesh = None if mesh is None else fitting(mesh, dictionary.trained)
    stops = _stops(resample_at, steps, dictionary.trained)
    keep = keeper(
        checkpoints, save_every, steps_per_call, dictionary.trained, plan, resample_at=sorted(stops),
        key=np.asarray(jax.random.key_data(key)).tolist(), normalize=normalize, centre=centre, not_finite=not_finite,
    )  # fmt: skip
    watch = Watch(f"Training {type(dictionary).__name__}", not_finite, metrics, tracker, checkpoints)
    how = _How(plan, watch, mesh, key, stops, keep, steps_per_call, normalize, centre)
    return _trained(dictionary, batches, how)


@dataclass(frozen=True)
class _How:
    """How a run goes, as `train` is told."""

    plan: Plan
    watch: Watch
    mesh: Mesh | None
    key: Key[Array, ""] | Array
    stops: frozenset[int]
    keep: Keeper | None
    per_call: int
    normalize: bool
    centre: bool


def _trained(dictionary: Dictionary | Crosscoder, batches: Iterable[Batch], how: _How) -> Training:
    """The run, from its beginning or from where it was kept."""
    plan, mesh, keep, steps = how.plan, how.mesh, how.keep, int(how.plan.steps)
    start = _taken_up(dictionary, plan, mesh, keep, batches)
    done, told = (0, []) if start is None else (start.done, [start.told])
    given = batches if start is None else start.batches
    stream = chunks(given, dictionary.reads, dictionary.writes, steps, how.per_call, done=done)
    if start is None:
        first = next(stream)
        scale, model = begin(dictionary, *first, normalize=how.normalize, centre=how.centre)
        stream, begins = chain([first], stream), begun(model, plan.optimizer)
    else:
        scale, begins = start.scale, start.state
        trimmed(how.watch.metrics, done)
    scale = scale if mesh is None else spread(scale, NamedSharding(mesh, PartitionSpec()))

    def after(
        groups: tuple[Group, ...], done: int, last: Stacked, measured: list[Measures]
    ) -> tuple[Group, ...]:
        told.extend(measured)
        state = groups[0].state
        if done in how.stops:
            own = jax.random.fold_in(how.key, done)
            state = resampled(state, plan, *sides(*last, scale, state.dictionary), own)
        if keep is not None and keep.due(done, steps):
            keep.save(done, state, scale, told, batches)
        return (replace(groups[0], state=state),)

    cut = _parts(stream, how.stops, done)
    (group,) = run(cut, plan, [Group(0, scale, begins)], how.watch, mesh=mesh, after=after, done=done)
    return training(dictionary, group.state, joined(told), scale, fold=how.normalize)


@dataclass(frozen=True)
class _Start:
    """Where a run is taken up that was kept."""

    done: int
    state: State
    scale: Float[Array, "2 *site"]
    told: Measures
    batches: Iterator[Batch]


def _taken_up(
    dictionary: Dictionary | Crosscoder,
    plan: Plan,
    mesh: Mesh | None,
    keep: Keeper | None,
    batches: Iterable[Batch],
) -> _Start | None:
    """What was kept of a run; None for one that begins."""
    if keep is None or (done := keep.newest()) is None:
        return None
    state, scale = begun(dictionary.trained, plan.optimizer), jnp.ones((2, *dictionary.reads[:-1]))
    if mesh is not None:
        state, scale = (
            placed(state, plan.optimizer, mesh),
            spread(scale, NamedSharding(mesh, PartitionSpec())),
        )
    state, scale, told, stream = keep.restore(done, state, scale)
    return _Start(done, state, scale, told, gone_on(batches, done, stream))


def training(
    given: Dictionary | Crosscoder,
    state: State,
    history: Measures,
    scale: Float[Array, "side *site"],
    *,
    fold: bool,
) -> Training:
    """What came of a run, in the data's own units where the scale is folded back."""
    found = given.with_trained(turned(state.dictionary))
    found = found.scaled(scale[0], scale[1]) if fold else found
    steps = jnp.arange(1, len(history["loss"]) + 1)
    return Training(steps, history, found, state.silent, state.skipped, scale)


def _stops(resample_at: Sequence[int], steps: int, dictionary: Dictionary) -> frozenset[int]:
    if resample_at and not dictionary.resamples:
        raise ArgumentError(
            f"resample_at={list(resample_at)}: dead latents of a {type(dictionary).__name__} cannot be begun anew from "
            "one token's directions. Leave it out."
        )
    if outside := [at for at in resample_at if not 1 <= at < steps]:
        raise ArgumentError(
            f"resample_at={list(resample_at)}: step {outside[0]} is not within 1 to {steps - 1}."
        )
    return frozenset(resample_at)


def _parts(stacks: Iterable[Stacked], stops: frozenset[int], done: int) -> Iterator[Stacked]:
    """Stacks of batches, cut after the steps at which something else is done."""
    for x, y in stacks:
        cuts = [0, *sorted(at - done for at in stops if done < at < done + len(x)), len(x)]
        for a, b in pairwise(cuts):
            yield x[a:b], None if y is None else y[a:b]
        done += len(x)
