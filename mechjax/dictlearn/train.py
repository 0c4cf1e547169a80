"""Train dictionaries of activations.

Many steps are one compiled program: batches of a call are stacked and scanned over, buffers are given away and come
back, and nothing is read on the host between. The data are divided by their root mean square, for which coefficients
are meant, and the scale is folded back into the dictionary that is returned.

Cost: for each batch of B tokens and k active latents of F about 2 d F B + 8 d k B operations and 56 d F bytes of Adam,
or 10 d F B where latents are many (`mechjax.dictionaries.products`). Misleads when: a low error is taken for the right
latents; compare seeds (`train_many`), and look at what they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.dictionaries import Crosscoder, Dictionary
from mechjax.dictlearn.loop import (
    Batch,
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
from mechjax.dictlearn.placement import fitting
from mechjax.dictlearn.plan import DEAD_AFTER, planned
from mechjax.dictlearn.resample import resampled
from mechjax.dictlearn.start import begin, put_back, trained_of
from mechjax.dictlearn.step import State, begun, turned


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
    optimizer: optax.GradientTransformation | None = None,
    steps_per_call: int = 20,
    metrics: str | Path | None = None,
    tracker: Tracker | None = None,
    mesh: Mesh | None = None,
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
        optimizer: In place of Adam, with a schedule of its own.
        steps_per_call: Steps of one compiled call.
        metrics: A file to which each step's measures are added, one line of JSON for each.
        tracker: Called with each step's number and measures, for a tracker of experiments.
        mesh: Splits latents over its axis `model` and tokens over `data` (`mj.make_mesh`); each device then holds
            1/model of every matrix. Where several processes share it, each gives the same batches.

    Returns:
        The trained dictionary, with the history.

    Raises:
        ArgumentError: Numbers outside their range, too few batches, one that is not finite, or a mesh that does not
            divide the latents.
        ShapeError: Batches of another width, or of changing shape.
        WriteError: A file of metrics that cannot be written.
    """
    plan = planned(
        steps, steps_per_call, learning_rate, warm_up, decay, sparsity_warm_up, target_l0, dead_after, optimizer
    )  # fmt: skip
    mesh = None if mesh is None else fitting(mesh, trained_of(dictionary))
    stops = _stops(resample_at, steps, trained_of(dictionary))
    stream = chunks(batches, dictionary.reads, dictionary.writes, steps, steps_per_call)
    first = next(stream)
    scale, model = begin(dictionary, *first, normalize=normalize, centre=centre)

    def after(state: State, done: int, last: Stacked, measured: Measures) -> State:
        if done not in stops:
            return state
        return resampled(state, plan, *sides(*last, scale, state.dictionary), jax.random.fold_in(key, done))

    state, recorded = run(
        _parts(chain([first], stream), stops), plan, scale, begun(model, plan.optimizer),
        Watch(f"Training {type(dictionary).__name__}", not_finite, metrics, tracker), mesh=mesh, after=after,
    )  # fmt: skip
    return training(dictionary, state, joined(recorded), scale, fold=normalize)


def training(
    given: Dictionary | Crosscoder,
    state: State,
    history: Measures,
    scale: Float[Array, "side *site"],
    *,
    fold: bool,
) -> Training:
    """What came of a run, in the data's own units where the scale is folded back."""
    found = put_back(given, turned(state.dictionary))
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


def _parts(stacks: Iterable[Stacked], stops: frozenset[int]) -> Iterator[Stacked]:
    """Stacks of batches, cut after the steps at which something else is done."""
    done = 0
    for x, y in stacks:
        cuts = [0, *sorted(at - done for at in stops if done < at < done + len(x)), len(x)]
        for a, b in pairwise(cuts):
            yield x[a:b], None if y is None else y[a:b]
        done += len(x)
