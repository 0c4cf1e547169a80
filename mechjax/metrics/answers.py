"""Metrics of given answers: logit difference, probability, negative log-likelihood, rank."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.metrics.metric import Metric, position, token_ids


class LogitDiff(Metric):
    """Logit of `correct` minus logit of `wrong`, in nats."""

    correct: Int[Array, "..."]
    wrong: Int[Array, "..."]

    def tokens(self) -> Int[Array, "*batch k"]:
        """The two answers."""
        return jnp.stack(jnp.broadcast_arrays(self.correct, self.wrong), -1)

    def given(self) -> dict[str, tuple[int, ...]]:
        """One per example at most: position and answers."""
        return {**super().given(), "correct": self.correct.shape, "wrong": self.wrong.shape}

    def of(self, logits: Float[Array, "*batch token"]) -> Float[Array, "*batch"]:
        """The difference of the two."""
        return logits[..., 0] - logits[..., 1]


class _OfAnswer(Metric):
    """A metric of one answer that needs the whole vocabulary beside it."""

    answer: Int[Array, "..."]

    def given(self) -> dict[str, tuple[int, ...]]:
        """One per example at most: position and answer."""
        return {**super().given(), "answer": self.answer.shape}

    def _picked(self, values: Float[Array, "*batch d_vocab"]) -> Float[Array, "*batch"]:
        answer = jnp.broadcast_to(self.answer, values.shape[:-1])
        return jnp.take_along_axis(values, answer[..., None], -1, mode="fill", fill_value=jnp.nan)[..., 0]


class Prob(_OfAnswer):
    """Probability of `answer`."""

    def of(self, logits: Float[Array, "*batch token"]) -> Float[Array, "*batch"]:
        """Softmax at the answer."""
        return self._picked(jax.nn.softmax(logits.astype(jnp.float32), -1))


class NLL(_OfAnswer):
    """Negative log-likelihood of `answer`, in nats."""

    def of(self, logits: Float[Array, "*batch token"]) -> Float[Array, "*batch"]:
        """Minus the log-softmax at the answer."""
        return -self._picked(jax.nn.log_softmax(logits.astype(jnp.float32), -1))


class Rank(_OfAnswer):
    """How many tokens have a larger logit than `answer`: 0 is the most likely. Its gradient is zero."""

    def of(self, logits: Float[Array, "*batch token"]) -> Float[Array, "*batch"]:
        """The count, as a float; NaN where a logit is NaN."""
        mine = self._picked(logits)
        count = (logits > mine[..., None]).sum(-1).astype(jnp.float32)
        return jnp.where(jnp.isnan(logits).any(-1) | jnp.isnan(mine), jnp.nan, count)


def logit_diff(correct: Any, wrong: Any, pos: Any = -1) -> LogitDiff:
    """Logit of the correct answer minus logit of the wrong one: the usual metric of patching.

    Linear in the logits, so it neither saturates nor depends on other tokens (Wang et al. 2022, arXiv:2211.00593).

    Args:
        correct: Token id, one for all examples or one per example.
        wrong: The same.
        pos: Position, one for all or one per example; negative counts from the end of the real tokens.
    """
    return LogitDiff(position(pos), token_ids(correct, "correct"), token_ids(wrong, "wrong"))


def prob(answer: Any, pos: Any = -1) -> Prob:
    """Probability of an answer. Saturates near 0 and 1, where patching shows little. Arguments as in `logit_diff`."""
    return Prob(position(pos), token_ids(answer, "answer"))


def nll(answer: Any, pos: Any = -1) -> NLL:
    """Negative log-likelihood of an answer, in nats. Arguments as in `logit_diff`."""
    return NLL(position(pos), token_ids(answer, "answer"))


def rank(answer: Any, pos: Any = -1) -> Rank:
    """Rank of an answer, 0 for the most likely. Arguments as in `logit_diff`."""
    return Rank(position(pos), token_ids(answer, "answer"))
