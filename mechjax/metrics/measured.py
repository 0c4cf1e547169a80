"""From any stream to the metric: what methods run, again and again."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.metrics.metric import Metric
from mechjax.models.decoder import Decoder, through
from mechjax.models.readout import readout
from mechjax.models.resume import resume
from mechjax.transform.select import is_concrete


class Measured(eqx.Module):
    """A metric, with where in a batch it reads."""

    metric: Metric
    at: Int[Array, " batch"]
    tokens: Int[Array, "batch k"] | None

    def of(
        self, model: Decoder, resid: Float[Array, "part pos d_model"], first: Int[Array, ""] | None = None
    ) -> Float[Array, " part"]:
        """The metric, from what the unembedding reads.

        Args:
            model: The decoder.
            resid: The final stream of all examples, or of those from `first` on.
            first: None for all.

        Raises:
            ArgumentError: The metric gives anything but one number per example.
        """
        n, batch = resid.shape[0], self.at.shape[0]
        if first is None:
            return self.read(readout(model, resid, self.at, self.tokens))
        own = lambda x: lax.dynamic_slice_in_dim(x, first, n)
        logits = readout(model, resid, own(self.at), None if self.tokens is None else own(self.tokens))
        # A metric may hold something for each example, so it is given all of them.
        whole = lax.dynamic_update_slice_in_dim(
            jnp.zeros((batch, *logits.shape[1:]), logits.dtype), logits, first, 0
        )
        return own(self.read(whole))

    def of_rest(
        self, model: Decoder, layer: Int[Array, ""], resid: Float[Array, "batch pos d_model"], mask: Any
    ) -> Float[Array, " batch"]:
        """The metric of the run that goes on from a layer, which may be traced; the last runs only where it reads.

        Raises:
            ArgumentError: As `of`.
        """
        last = resume(model, layer).final(resid, self.at, mask=mask)
        return self.read(readout(model, last, jnp.zeros_like(self.at), self.tokens))

    def of_logits(self, logits: Float[Array, "batch pos d_vocab"]) -> Float[Array, " batch"]:
        """The metric, from all logits.

        Raises:
            ArgumentError: As `of`.
        """
        read = jnp.take_along_axis(logits, self.at[:, None, None], -2, mode="fill", fill_value=jnp.nan)[:, 0]
        return self.read(read if self.tokens is None else jnp.take_along_axis(read, self.tokens, -1))

    def read(self, logits: Float[Array, "batch token"]) -> Float[Array, " batch"]:
        """The metric of the logits that it reads.

        Raises:
            ArgumentError: As `of`.
        """
        return value_of(self.metric, logits)


def value_of(metric: Metric, logits: Float[Array, "batch token"]) -> Float[Array, " batch"]:
    """The metric of the logits that it reads, which must be one number per example.

    Raises:
        ArgumentError: It is not.
    """
    value = metric.of(logits)
    if value.shape != logits.shape[:-1]:
        raise ArgumentError(
            f"{type(metric).__name__} gives shape {value.shape} for a batch of {logits.shape[0]}: a metric gives one "
            "number per example, and this function takes the mean itself."
        )
    return value


def measured(
    metric: Any, ids: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None, d_vocab: int
) -> Measured:
    """The metric on prompts.

    Raises:
        ArgumentError: Something that is no metric, or that reads a token which the model does not have.
        ShapeError: Answers for another number of examples.
    """
    if not isinstance(metric, Metric):
        raise ArgumentError(
            f"the metric is a {type(metric).__name__}; give one of mj.metrics, such as logit_diff(correct, wrong), or "
            "a subclass of mj.metrics.Metric."
        )
    at = metric.where((ids.shape[0],), ids.shape[1], mask)  # first: it says which answers are missing
    columns = metric.tokens()
    if columns is not None:
        columns = jnp.broadcast_to(columns, (ids.shape[0], columns.shape[-1]))
        if is_concrete(columns) and int(columns.max(initial=0)) >= d_vocab:
            raise ArgumentError(
                f"the metric reads token {int(columns.max())}; the model has {d_vocab} tokens. Were the answers "
                "encoded with another tokenizer?"
            )
    return Measured(metric, at, columns)


def itself(value: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """The metric of a run that gives the metric."""
    return value


class FromStart(eqx.Module):
    """The metric of the run from what enters the first block."""

    model: Decoder
    measured: Measured

    def __call__(self, start: Float[Array, "batch pos d_model"], mask: Any) -> Float[Array, " batch"]:
        """One number per example."""
        sequence = self.model.arrange(start.shape[-2], mask=mask)
        return self.measured.of(self.model, through(self.model, start, sequence)[0])


class FromLayer(eqx.Module):
    """The metric of the run from what enters a layer, which may be traced; past the last it only reads the metric."""

    model: Decoder
    measured: Measured

    def __call__(
        self, resid: Float[Array, "batch pos d_model"], layer: Int[Array, ""], mask: Any
    ) -> Float[Array, " batch"]:
        """One number per example."""
        return self.measured.of(self.model, resume(self.model, layer).blocks(resid, mask=mask))
