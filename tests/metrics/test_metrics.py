"""Metrics against NumPy and SciPy-style formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, TokenError
from tests.tolerances import TOL

LAW = TOL["float32", "layout"]
LOGITS = jax.random.normal(jax.random.key(0), (3, 5, 7)) * 3
CORRECT, WRONG = np.array([0, 6, 2]), np.array([1, 1, 3])
MASK = jnp.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], bool)
LAST = np.array([2, 4, 4])  # columns of the last real tokens
P = np.exp(np.asarray(LOGITS, np.float64))
P /= P.sum(-1, keepdims=True)
ROWS = np.arange(3)

CASES = {
    "logit_diff": (
        mj.metrics.logit_diff(CORRECT, WRONG),
        lambda r, c: LOGITS[r, c, CORRECT] - LOGITS[r, c, WRONG],
    ),
    "prob": (mj.metrics.prob(CORRECT), lambda r, c: P[r, c, CORRECT]),
    "nll": (mj.metrics.nll(CORRECT), lambda r, c: -np.log(P[r, c, CORRECT])),
    "rank": (mj.metrics.rank(CORRECT), lambda r, c: (P[r, c] > P[r, c, CORRECT][:, None]).sum(-1)),
}


@pytest.mark.parametrize("name", CASES)
def test_metric__last_position__equals_formula(name):
    metric, formula = CASES[name]
    np.testing.assert_allclose(metric(LOGITS), formula(ROWS, np.full(3, 4)), **LAW)


@pytest.mark.parametrize("name", CASES)
def test_metric__with_mask__reads_the_last_real_token(name):
    metric, formula = CASES[name]
    np.testing.assert_allclose(metric(LOGITS, MASK), formula(ROWS, LAST), **LAW)


def test_metric__position_per_example__counts_real_tokens():
    metric = mj.metrics.logit_diff(CORRECT, WRONG, pos=[0, 1, -2])
    at = np.array([0, 3, 3])
    np.testing.assert_allclose(
        metric(LOGITS, MASK), LOGITS[ROWS, at, CORRECT] - LOGITS[ROWS, at, WRONG], **LAW
    )


def test_metric__one_answer_for_all__broadcasts():
    np.testing.assert_allclose(
        mj.metrics.logit_diff(2, 3)(LOGITS), LOGITS[:, -1, 2] - LOGITS[:, -1, 3], **LAW
    )


def test_kl__against_formula__and_zero_for_itself():
    other = LOGITS[:, 0] + 1.0
    q = np.exp(np.asarray(other, np.float64))
    q /= q.sum(-1, keepdims=True)
    expected = (q * (np.log(q) - np.log(P[:, -1]))).sum(-1)
    np.testing.assert_allclose(mj.metrics.kl(other)(LOGITS), expected, **LAW)
    np.testing.assert_allclose(mj.metrics.kl(LOGITS[:, -1])(LOGITS), 0, atol=1e-6)


def test_kl__reference_without_mass_somewhere__is_finite():
    reference = jnp.where(jnp.arange(7) < 3, LOGITS[:, -1], -jnp.inf)
    value = mj.metrics.kl(reference)(LOGITS)
    assert np.isfinite(value).all() and (value > 0).all()


def test_rank__nan_logits__is_nan():
    assert np.isnan(mj.metrics.rank(2)(jnp.full((1, 1, 7), jnp.nan))).all()


def test_metric__answers_for_another_batch__refused():
    with pytest.raises(ShapeError, match=r"`correct` has shape \(2,\) for a batch of shape \(3,\)"):
        mj.metrics.logit_diff([0, 1], 2)(LOGITS)
    with pytest.raises(ShapeError, match=r"`reference` has shape"):
        mj.metrics.kl(LOGITS[:2, 0])(LOGITS)
    with pytest.raises(ShapeError, match=r"`answer` has shape"):
        mj.metrics.prob([0, 1])(LOGITS)


def test_metric__position_that_is_not_there__refused():
    with pytest.raises(ArgumentError, match="reads position 5 of example 0, which has 5 tokens"):
        mj.metrics.prob(1, pos=5)(LOGITS)
    with pytest.raises(ArgumentError, match="reads position 3 of example 0, which has 3 tokens"):
        mj.metrics.prob(1, pos=3)(LOGITS, MASK)


def test_metric__text_or_negative_ids__refused():
    with pytest.raises(TokenError, match=r"correct must be token ids .* tokenizer.token"):
        mj.metrics.logit_diff(1.5, 2)
    with pytest.raises(TokenError, match="wrong: -1 is no token id"):
        mj.metrics.logit_diff(1, -1)
    with pytest.raises(ArgumentError, match="pos must be integers"):
        mj.metrics.prob(1, pos=0.5)


def test_metric__id_past_the_vocabulary_as_data__is_nan():
    run = jax.jit(lambda i: mj.metrics.logit_diff(i, 0)(LOGITS))
    assert np.isnan(run(7)).all() and np.isfinite(run(6)).all()
