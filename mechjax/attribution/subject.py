"""What every method of this package is given, checked and run: both sides, the ablation, the metric."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.attribution.same import seen_apart
from mechjax.attribution.scores import Reduce
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.graph.build import Graph
from mechjax.graph.forward import masked_stream
from mechjax.graph.spans import spans_of
from mechjax.graph.writes import Blocks, Writes, sites, writes, writes_from
from mechjax.metrics.measured import Measured, measured
from mechjax.metrics.metric import Metric
from mechjax.models.backward_rules import GRADIENT, Rules, backward_rules
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.tasks.pairing import batched, paired
from mechjax.transform.captured import Activations
from mechjax.transform.transforms import capture

Ablation = Literal["resample", "zero", "mean", "mean_per_pos"]
"""What stands in for what a node writes: what it writes on the corrupt prompt, nothing, or its mean over a reference
set (and its positions, or position by position)."""

PART_BYTES = (
    3e8  # what the backward pass of some examples may keep; larger parts are no faster on CPU (measured)
)


class Subject(eqx.Module):
    """The model as its graph sees it, the clean run's start, and what stands in for what nodes write.

    Attributes:
        model: The decoder, keys and values repeated where the graph has them apart, under its backward rules.
        measured: The metric.
        mask: True for real tokens; None where all are.
        start: What enters the first block in the clean run.
        ablated: What nodes write when ablated.
        rules: The backward rules of `model` (static).
        graph: The graph, of `model` (static).
        spans: The span of each position; None where the graph sums positions.
        first: Where in the metric's batch these examples begin; None where they are all of it.
    """

    model: Decoder
    measured: Measured
    mask: Bool[Array, "batch pos"] | None
    start: Float[Array, "batch pos d_model"]
    ablated: Writes
    rules: Rules = eqx.field(static=True)
    graph: Graph = eqx.field(static=True)
    spans: Int[Array, "batch pos"] | None = None
    first: Int[Array, ""] | None = None

    def value(self, last: Float[Array, "batch pos d_model"]) -> Float[Array, " batch"]:
        """The metric, from what the unembedding reads."""
        return self.measured.of(self.model, last, self.first)

    def __call__(self, start: Float[Array, "batch pos d_model"]) -> Float[Array, " batch"]:
        """The metric of the run that begins with `start`."""
        return self.value(Blocks(self.model)(start, self.mask))

    def masked(self, kept: Float[Array, " edge"]) -> Float[Array, " batch"]:
        """The metric of the run in which edges are cut (`mechjax.graph.forward`)."""
        last = masked_stream(
            self.model, self.start, kept, self.ablated, graph=self.graph, spans=self.spans, mask=self.mask
        )
        return self.value(last)

    def parts(self) -> Iterator["Subject"]:
        """The examples in groups of which a forward and backward fit in PART_BYTES."""
        config, (batch, n_pos) = self.model.config, self.start.shape[:2]
        widths = 8 * config.d_model + 3 * config.d_mlp + 3 * config.n_heads * n_pos
        size = config.n_layers * widths * n_pos * self.start.dtype.itemsize
        most = max(1, int(PART_BYTES / size))
        n = next(
            (n for n in range(most, most // 2, -1) if batch % n == 0), most
        )  # alike, so that one program does
        for first in range(0, batch, n) if n < batch else ():
            rows = slice(first, first + n)
            yield Subject(
                self.model,
                self.measured,
                None if self.mask is None else self.mask[rows],
                self.start[rows],
                self.ablated.examples(rows),
                self.rules,
                self.graph,
                None if self.spans is None else self.spans[rows],
                jnp.int32(first),
            )
        if n >= batch:
            yield self


def subject(
    model: Decoder, clean: Any, corrupt: Any, metric: Metric, graph: Graph, ablation: str, reference: Any,
    reduce: str = "mean", rules: Rules = GRADIENT, positions: Any = None,
) -> Subject:  # fmt: skip
    """Both sides, checked.

    Raises:
        ArgumentError: The graph of another model, an unknown ablation or reduction, a mean without a reference set, a
            run whose activations are not finite, spans that the graph does not have.
        PairingError: Clean and corrupt prompts that do not line up.
        ShapeError: Reference prompts of another length where the mean is per position.
        UnsupportedModelError: A model in which a backward rule would be missed.
    """
    check_ablation(ablation, reference, corrupt, reduce)
    seen = graph.view(model)
    (ids, mask), (other, _) = paired(clean, clean if corrupt is None else corrupt, model.config)
    start, own = seen.embed(ids, mask=mask), graph.seen
    spans = spans_of(graph, positions, ids.shape)
    match ablation:
        case "resample":
            ablated = writes(seen, other, graph=own, mask=mask)
        case "zero":
            like = eqx.filter_eval_shape(writes_from, seen, start, mask, own)
            ablated = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
        case _:
            ablated = _mean(seen, reference, start, own, per_pos=ablation == "mean_per_pos")
    ruled, read = backward_rules(seen, rules), measured(metric, ids, mask, model.config.d_vocab)
    return Subject(ruled, read, mask, start, ablated, rules, own, spans)


@eqx.filter_jit
def clean_run(given: Subject, beside: tuple[str, ...] = ()) -> tuple[Array, Array, Activations]:
    """The clean metric, what the unembedding reads, and what writes are made of, with the activations of more sites."""
    names = (*sites(given.model, given.graph), *beside)
    last, acts = capture(Blocks(given.model), names)(given.start, given.mask)
    return given.value(last), last, acts


@eqx.filter_jit
def sent_by(given: Subject, intact: Writes, *, resampled: bool) -> Writes:
    """w_u - a_u. The two come from different programs, so what is equal is made so: where both runs saw the same."""
    sent = jax.tree.map(jnp.subtract, intact, given.ablated)
    if not resampled:
        return sent
    seen = seen_apart(given.start, given.ablated.input, given.model.config)
    return sent.mapped(
        lambda x, lead: jnp.where(seen.reshape((1,) * lead + seen.shape + (1,) * (x.ndim - lead - 2)), x, 0)
    )


def over_parts(
    given: Subject, part: Callable[[Subject], tuple[Array, Array]], *, per_example: bool
) -> tuple[Float[Array, "example edge"], Float[Array, " batch"]]:
    """Scores of each example, or as one example their mean, and values, from what `part` gives of some examples."""
    found, values = zip(*(part(some) for some in given.parts()), strict=True)
    whole = jnp.concatenate(found)
    scores = whole if per_example else whole.sum(0, keepdims=True) / given.start.shape[0]
    return scores, jnp.concatenate(values)


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


def _mean(model: Decoder, reference: Any, start: Array, graph: Graph, *, per_pos: bool) -> Writes:
    """The mean over the real tokens of a reference set, at every place of `start`."""
    ids, mask = as_tokens(batched(reference), None, model.config)
    batch, n_pos = start.shape[:2]
    if per_pos and ids.shape[-1] != n_pos:
        raise ShapeError(
            f"ablation='mean_per_pos': the reference prompts have {ids.shape[-1]} tokens and the pairs "
            f"{n_pos}. Use prompts of one length, or ablation='mean'."
        )
    real = jnp.ones(ids.shape, bool) if mask is None else mask
    over = (0,) if per_pos else (0, 1)
    found = writes(model, ids, graph=graph, mask=mask)

    def mean(x: Array, lead: int) -> Array:
        axes = tuple(lead + i for i in over)
        weight = real.reshape((1,) * lead + real.shape + (1,) * (x.ndim - lead - 2)).astype(x.dtype)
        total = jnp.maximum(weight.sum(axes, keepdims=True), 1)
        like = (*x.shape[:lead], batch, n_pos, *x.shape[lead + 2 :])
        return jnp.broadcast_to((x * weight).sum(axes, keepdims=True) / total, like)

    return found.mapped(mean)
