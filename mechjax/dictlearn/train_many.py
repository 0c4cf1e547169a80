"""Train many dictionaries at once: seeds, kinds, widths, coefficients or layers, fed by one forward of the model.

What makes activations runs once for all of them. Those of one kind and size share a compiled program: on an accelerator
they are mapped over a leading axis and fill the machine together; on a CPU, which one fills, they take turns. Each
learns as it would alone (`train`), to rounding.

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
from jaxtyping import Array

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries import Crosscoder, Dictionary
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
)
from mechjax.dictlearn.placement import fitting
from mechjax.dictlearn.plan import DEAD_AFTER, planned
from mechjax.dictlearn.start import begin
from mechjax.dictlearn.step import State, begun
from mechjax.dictlearn.train import Training, training

ONE_BY_ONE = (
    "cpu",
)  # mapped steps of a CPU take 1.2 times as long as steps in turn (measured, 4 of 256 x 4,096)


@on_any_mesh
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
    unit_gradients: bool = True,
    optimizer: optax.GradientTransformation | None = None,
    steps_per_call: int = 20,
    metrics: str | Path | None = None,
    tracker: Tracker | None = None,
    mesh: Mesh | None = None,
) -> tuple[Training, ...]:
    """Minimise each dictionary's loss over batches of activations.

    Args:
        dictionaries: Of any kinds and numbers of latents that read and write vectors of one size. Each kind, size and
            k is compiled once.
        batches: One array (batch, d_model) for each step, that all of them read, or pairs, as for `train`.
        steps: How many.
        learning_rate: Its peak.
        own_batches: Whether arrays are (dictionary, batch, d_model), a part for each: layers of a site, say.
        warm_up: Steps over which the learning rate grows to its peak.
        decay: Over which last part of the run it falls to 0, linearly.
        sparsity_warm_up: Over which first part of the run coefficients of sparsity grow to their values.
        target_l0: Active latents of a token to steer each coefficient to; None leaves them.
        dead_after: Tokens without activity after which a latent is dead.
        normalize: Whether to divide the data by their root mean square, and fold it back.
        centre: Whether to set biases to the middle of the first batches.
        not_finite: What to do with a batch that holds NaN or makes one: "abort", or "skip" it and count.
        unit_gradients: Whether Adam is told each gradient's direction alone (`plan` says why).
        optimizer: In place of Adam and of unit gradients, with a schedule of its own.
        steps_per_call: Steps of one compiled call.
        metrics: A file to which each step's measures are added, lists with a number for each dictionary.
        tracker: Called with each step's number and measures.
        mesh: Splits latents and tokens, as for `train`.

    Returns:
        Each dictionary's training, in their order.

    Raises:
        ArgumentError: Dictionaries that cannot share batches, and what `train` refuses.
        ShapeError: Batches of another width, or of changing shape.
        WriteError: A file of metrics that cannot be written.
    """
    mesh = _shared(dictionaries, mesh)
    plan = planned(
        steps, steps_per_call, learning_rate, warm_up, decay, sparsity_warm_up, target_l0, dead_after, optimizer,
        unit_gradients,
    )  # fmt: skip
    one, kinds = dictionaries[0], ", ".join(dict.fromkeys(type(d).__name__ for d in dictionaries))
    lead = (len(dictionaries),) if own_batches else ()
    stream = chunks(batches, one.reads, one.writes, steps, steps_per_call, many=lead)
    first = next(stream)
    own = lambda z, i: z[:, i] if own_batches and z is not None else z
    begins = [
        begin(d, own(first[0], i), own(first[1], i), normalize=normalize, centre=centre)
        for i, d in enumerate(dictionaries)
    ]
    told: list[list[Measures]] = []

    def after(
        groups: tuple[Group, ...], done: int, last: Stacked, measured: list[Measures]
    ) -> tuple[Group, ...]:
        told.append(measured)
        return groups

    groups = _grouped([(scale, begun(model, plan.optimizer)) for scale, model in begins])
    watch = Watch(f"Training {len(dictionaries)} x {kinds}", not_finite, metrics, tracker)
    groups = run(chain([first], stream), plan, groups, watch, mesh=mesh, own=own_batches, after=after)
    return _apart(dictionaries, groups, told, fold=normalize)


def _shared(dictionaries: Sequence[Dictionary | Crosscoder], mesh: Mesh | None) -> Mesh | None:
    """The mesh, where all dictionaries can share batches and it.

    Raises:
        ArgumentError: They cannot.
    """
    if not dictionaries or len({(d.reads, d.writes) for d in dictionaries}) > 1:
        sizes = sorted({f"{d.reads} to {d.writes}" for d in dictionaries})
        raise ArgumentError(
            f"{len(dictionaries)} dictionaries that read and write {', '.join(sizes) or 'nothing'}: those that share "
            "batches read and write vectors of one size. Train others in another call."
        )
    return None if mesh is None else [fitting(mesh, d.trained) for d in dictionaries][-1]


def _apart(
    dictionaries: Sequence[Dictionary | Crosscoder],
    groups: Sequence[Group],
    told: Sequence[list[Measures]],
    *,
    fold: bool,
) -> tuple[Training, ...]:
    """What came of each dictionary, in their order."""
    found = {}
    for at, group in enumerate(groups):
        for i, (n, history) in enumerate(group.apart(joined([measured[at] for measured in told]))):
            alone = isinstance(group.members, int)
            take = lambda x, i=i, alone=alone: x[i] if eqx.is_array(x) and not alone else x
            state, scale = jax.tree.map(take, group.state), take(group.scale)
            found[n] = training(dictionaries[n], state, history, scale, fold=fold)
    return tuple(found[n] for n in range(len(dictionaries)))


def _grouped(begins: Sequence[tuple[Array, State]]) -> list[Group]:
    """What runs as one call: each dictionary, or on other platforms than a CPU all of one kind and size."""
    alike: dict[Any, list[int]] = {}
    for n, (_, state) in enumerate(begins):
        shapes = tuple(x.shape for x in jax.tree.leaves(state))
        alike.setdefault((jax.tree.structure(state), shapes), []).append(n)
    groups = []
    for members in alike.values():
        if len(members) == 1 or jax.default_backend() in ONE_BY_ONE:
            groups += [Group(n, *begins[n]) for n in members]
            continue
        stacked = jax.tree.map(
            lambda *x: jnp.stack(x) if eqx.is_array(x[0]) else x[0], *(begins[n] for n in members)
        )
        groups.append(Group(tuple(members), *stacked))
    return groups
