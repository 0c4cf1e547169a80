"""The metric of a whole run of any function, from what the function gives."""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.inputs import Inputs
from mechjax.metrics.metric import Metric
from mechjax.transform.select import is_concrete
from mechjax.transform.static import hold, unhold

Reads = Metric | Callable[[Any], Array]
"""A metric of logits, or any function of the output that gives one number per example."""


class OfOutput(eqx.Module):
    """The metric of a run.

    Attributes:
        fn: The function that runs.
        metric: A metric, or a function of the output.
    """

    fn: Any
    metric: Any

    def __call__(self, given: Inputs) -> Float[Array, " batch"]:
        """One number per example.

        Raises:
            ArgumentError: An output without logits, or a metric that gives anything else.
            ShapeError: Logits of a shape that the metric cannot read.
        """
        out = unhold(self.fn)(*given.args, **given.kwargs)
        if not isinstance(self.metric, Metric):
            value = jnp.asarray(unhold(self.metric)(out))
            if value.ndim != 1 or not jnp.issubdtype(value.dtype, jnp.floating):
                raise ArgumentError(
                    f"the metric gives {value.dtype}{list(value.shape)}: a function of the output gives one real "
                    "number per example, (batch,), and this method takes the mean itself."
                )
            return value
        logits, mask = _readable(logits_of(out), given.mask)
        return self.metric(logits, mask)


def of_output(fn: Any, metric: Reads, given: Inputs) -> OfOutput:
    """The metric of runs of `fn`, checked on the shapes of one call. Zero FLOPs.

    Raises:
        ArgumentError: Something that is no metric and no function; an output without logits; a metric that reads a
            token or position that is not there, or gives anything but one number per example.
        ShapeError: Answers for another number of examples, or logits of a shape that no metric reads.
    """
    if not callable(metric):
        raise ArgumentError(
            f"the metric is a {type(metric).__name__}; give one of mj.metrics, such as logit_diff(correct, wrong), or "
            "a function of the output that gives one number per example."
        )
    run = OfOutput(hold(fn), metric if isinstance(metric, Metric) else hold(metric))
    if isinstance(metric, Metric):
        out = eqx.filter_eval_shape(lambda given: logits_of(fn(*given.args, **given.kwargs)), given)
        shape = out.shape if out.ndim != 2 else (out.shape[0], 1, out.shape[1])
        mask = given.mask if out.ndim == 3 else None
        if len(shape) == 3:
            metric.where(shape[:1], shape[1], mask if mask is None or mask.shape == shape[:2] else None)
        columns = metric.tokens()
        if columns is not None and is_concrete(columns) and int(columns.max(initial=0)) >= shape[-1]:
            raise ArgumentError(
                f"the metric reads token {int(columns.max())}; the output has logits of {shape[-1]}. Were the answers "
                "encoded with another tokenizer?"
            )
    eqx.filter_eval_shape(lambda run, given: run(given), run, given)
    return run


def logits_of(out: Any) -> Float[Array, "..."]:
    """The logits of an output: the output itself where it is an array, else what it calls `logits`.

    Raises:
        ArgumentError: There are none.
    """
    if isinstance(out, jax.Array):
        return out
    found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    if not isinstance(found, jax.Array):
        names = list(out) if isinstance(out, Mapping) else list(getattr(out, "__dict__", {}))
        have = f" with {', '.join(map(str, names))}" if names else ""
        raise ArgumentError(
            f"the function gives a {type(out).__name__}{have}, in which nothing is called `logits`. Say what the "
            "metric reads: metric=lambda out: own_metric(out[0]), any function that gives one number per example."
        )
    return found


def _readable(logits: Array, mask: Any) -> tuple[Array, Any]:
    """Logits with an axis of positions, one where there is none, and the mask of these."""
    if logits.ndim == 2:  # (batch, class)
        return logits[:, None], None
    if logits.ndim != 3:
        raise ShapeError(
            f"the output has logits of shape {logits.shape}: a metric reads (batch, pos, d_vocab) or (batch, class). "
            "Run a model of one example under jax.vmap, or give a function of the output as the metric."
        )
    if mask is not None and mask.shape != logits.shape[:2]:
        raise ShapeError(
            f"the mask has shape {mask.shape} and the logits {logits.shape}, so it does not say which of their "
            "positions are real. Give a function of the output as the metric."
        )
    return logits, mask
