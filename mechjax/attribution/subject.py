"""What every method of this package is given, checked and run: both sides, the ablation, the metric."""

from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.attribution.measured import Measured, measured
from mechjax.attribution.scores import Reduce
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.graph.build import Graph
from mechjax.graph.writes import Writes, writes
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.tasks.pairing import batched, paired

Ablation = Literal["resample", "zero", "mean", "mean_per_pos"]
"""What stands in for what a node writes: what it writes on the corrupt prompt, nothing, or its mean over a reference
set (and its positions, or position by position)."""


class Subject(eqx.Module):
    """The model as its graph sees it, and both runs.

    Attributes:
        model: The decoder, keys and values repeated where the graph has them apart.
        measured: The metric.
        mask: True for real tokens; None where all are.
        intact: What nodes write in the clean run.
        ablated: What they write when ablated.
    """

    model: Decoder
    measured: Measured
    mask: Bool[Array, "batch pos"] | None
    intact: Writes
    ablated: Writes

    @property
    def start(self) -> Float[Array, "batch pos d_model"]:
        """What enters the first block."""
        return self.intact.input


def subject(
    model: Decoder, clean: Any, corrupt: Any, metric: Metric, graph: Graph, ablation: str, reference: Any,
    reduce: str = "mean",
) -> Subject:  # fmt: skip
    """Both runs, checked.

    Raises:
        ArgumentError: The graph of another model, an unknown ablation or reduction, a mean without a reference set, a
            run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
        ShapeError: Reference prompts of another length where the mean is per position.
    """
    check_ablation(ablation, reference, corrupt, reduce)
    seen = graph.view(model)
    (ids, mask), (other, _) = paired(clean, clean if corrupt is None else corrupt, model.config)
    intact = writes(seen, ids, mask=mask)
    match ablation:
        case "resample":
            ablated = writes(seen, other, mask=mask)
        case "zero":
            ablated = jax.tree.map(jnp.zeros_like, intact)
        case _:
            ablated = _mean(seen, reference, intact, per_pos=ablation == "mean_per_pos")
    return Subject(seen, measured(metric, ids, mask, model.config.d_vocab), mask, intact, ablated)


def check_ablation(ablation: str, reference: Any, corrupt: Any, reduce: str) -> None:
    """Whether an ablation has what it needs, and no more.

    Raises:
        ArgumentError: An unknown ablation or reduction, a mean without a reference set, or nothing to resample from.
    """
    for name, given, known in (
        ("ablation", ablation, get_args(Ablation)),
        ("reduce", reduce, get_args(Reduce)),
    ):
        if given not in known:
            raise ArgumentError(f"{name}={given!r}: expected one of {', '.join(map(repr, known))}.")
    if (reference is not None) != ablation.startswith("mean"):
        raise ArgumentError(
            f"ablation={ablation!r} {'needs' if reference is None else 'takes no'} `reference=`: the prompts over "
            "which the mean is taken. It goes with 'mean' and 'mean_per_pos'."
        )
    if corrupt is None and ablation == "resample":
        raise ArgumentError(
            "ablation='resample' puts in what nodes write on corrupt prompts: give `corrupt`."
        )


def _mean(model: Decoder, reference: Any, like: Writes, *, per_pos: bool) -> Writes:
    """The mean over the real tokens of a reference set, at every place of `like`."""
    ids, mask = as_tokens(batched(reference), None, model.config)
    if per_pos and ids.shape[-1] != like.input.shape[-2]:
        raise ShapeError(
            f"ablation='mean_per_pos': the reference prompts have {ids.shape[-1]} tokens and the pairs "
            f"{like.input.shape[-2]}. Use prompts of one length, or ablation='mean'."
        )
    real = jnp.ones(ids.shape, bool) if mask is None else mask
    over = (0,) if per_pos else (0, 1)
    found = writes(model, ids, mask=mask)

    def mean(x: Array, like: Array, lead: int) -> Array:
        axes = tuple(lead + i for i in over)
        weight = real.reshape((1,) * lead + real.shape + (1,) * (x.ndim - lead - 2)).astype(x.dtype)
        total = jnp.maximum(weight.sum(axes, keepdims=True), 1)
        return jnp.broadcast_to((x * weight).sum(axes, keepdims=True) / total, like.shape)

    mlps = None if found.mlps is None or like.mlps is None else mean(found.mlps, like.mlps, 1)
    return Writes(mean(found.input, like.input, 0), mean(found.heads, like.heads, 1), mlps)
