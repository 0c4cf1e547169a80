"""Train many dictionaries at once: seeds, coefficients or layers, fed by one forward of the model.

One program holds them all, mapped over a leading axis: what makes activations runs once for all of them, and small
dictionaries fill the machine together. Each learns as it would alone (`train`), to rounding.

Cost: that of as many runs of `train`, less what is shared. Misleads: see `train`.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries import Crosscoder, Dictionary
from mechjax.dictlearn.loop import Batch, Measures, NotFinite, Stacked, Tracker, Watch, chunks, joined, run
from mechjax.dictlearn.placement import fitting
from mechjax.dictlearn.plan import DEAD_AFTER, planned
from mechjax.dictlearn.start import begin, trained_of
from mechjax.dictlearn.step import State, begun
from mechjax.dictlearn.train import Training, training


def train_many(
    dictionaries: Sequence[Dictionary | Crosscoder],
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float,
    own_batches: bool = False,
    warm_up: int = 0,
    decay: float = 1 / 3,
    sparsity_warm_up: float = 0.05,
    target_l0: float | None = None,
    dead_after: int = DEAD_AFTER,
    normalize: bool = True,
    centre: bool = True,
    not_finite: NotFinite = "abort",
    optimizer: optax.GradientTransformation | None = None,
    steps_per_call: int = 20,
    metrics: str | Path | None = None,
    tracker: Tracker | None = None,
    mesh: Mesh | None = None,
) -> tuple[Training, ...]:
    """Minimise each dictionary's loss over batches of activations.

    Args:
        dictionaries: Of one kind and size; their coefficients may differ.
        batches: One array (batch, d_model) for each step, that all of them read, or pairs, as for `train`.
        steps: How many.
        learning_rate: Its peak.
        own_batches: Whether each dictionary reads its own part of an array (dictionary, batch, d_model): one layer of
            `acts["resid_post"]`, say.
        warm_up: Steps over which the learning rate grows to its peak.
        decay: Over which last part of the run it falls to 0, linearly.
        sparsity_warm_up: Over which first part of the run coefficients of sparsity grow to their values.
        target_l0: Active latents of a token to steer each coefficient to; None leaves them.
        dead_after: Tokens without activity after which a latent is dead.
        normalize: Whether to divide the data by their root mean square, and fold it back.
        centre: Whether to set biases to the middle of the first batches.
        not_finite: What to do with a batch that holds NaN or makes one: "abort", or "skip" it and count.
        optimizer: In place of Adam, with a schedule of its own.
        steps_per_call: Steps of one compiled call.
        metrics: A file to which each step's measures are added, lists with a number for each dictionary.
        tracker: Called with each step's number and measures.
        mesh: Splits latents and tokens, as for `train`.

    Returns:
        Each dictionary's training, in their order.

    Raises:
        ArgumentError: Dictionaries that differ in kind or size, and what `train` refuses.
        ShapeError: Batches of another width, or of changing shape.
        WriteError: A file of metrics that cannot be written.
    """
    kinds = {(jax.tree.structure(d), tuple(x.shape for x in jax.tree.leaves(d))) for d in dictionaries}
    if len(kinds) != 1:
        raise ArgumentError(
            f"{len(dictionaries)} dictionaries of {len(kinds)} kinds or sizes: those that are trained in one program "
            "have one kind, one size and one k. Train others in another call."
        )
    plan = planned(
        steps, steps_per_call, learning_rate, warm_up, decay, sparsity_warm_up, target_l0, dead_after, optimizer
    )  # fmt: skip
    n, one = len(dictionaries), dictionaries[0]
    mesh = None if mesh is None else fitting(mesh, trained_of(one))
    lead = (n,) if own_batches else ()
    stream = chunks(batches, one.reads, one.writes, steps, steps_per_call, many=lead)
    first = next(stream)
    own = lambda z, i: z[:, i] if own_batches and z is not None else z
    begins = [
        begin(d, own(first[0], i), own(first[1], i), normalize=normalize, centre=centre)
        for i, d in enumerate(dictionaries)
    ]
    scale = jnp.stack([s for s, _ in begins])
    recorded: list[Measures] = []

    def after(state: State, done: int, last: Stacked, measured: Measures) -> State:
        recorded.append(measured)
        return state

    state = run(
        chain([first], stream), plan, scale, _stacked([begun(model, plan.optimizer) for _, model in begins]),
        Watch(f"Training {n} x {type(one).__name__}", not_finite, metrics, tracker), mesh=mesh, own=own_batches,
        after=after,
    )  # fmt: skip
    history = joined(recorded)
    of = lambda tree, i: jax.tree.map(lambda x: x[i] if eqx.is_array(x) else x, tree)
    columns = [{name: values[:, i] for name, values in history.items()} for i in range(n)]
    return tuple(training(one, of(state, i), columns[i], scale[i], fold=normalize) for i in range(n))


def _stacked(states: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *states)
