"""Logistic probes at their optimum: against scipy in float64, closed forms, and what cannot be fitted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.fit import logistic
from mechjax.fit.logistic import optimum
from tests.compilations import nothing_compiles
from tests.fit.by_scipy import by_scipy
from tests.tolerances import TOL

ROWS, D, PROBES = 240, 12, 3
CLOSE = TOL["float32", "gradient"]


@pytest.fixture(scope="module")
def data():
    """Rows whose columns differ in size and lie far from 0, classes that are not separable, and uneven weights."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, D)) * np.exp(rng.normal(size=D))
    y = (x @ rng.normal(size=(D, PROBES)) + rng.logistic(size=(ROWS, PROBES)) > 0.5).T
    return (x + 5).astype(np.float32), y, rng.uniform(0.2, 2, (PROBES, ROWS)).astype(np.float32)


@pytest.mark.parametrize("l2", [1.0, 1e-2])
def test_logistic__equals_scipy_in_float64(data, l2):
    x, y, weights = data
    found = logistic(x, y, weights=weights, l2=l2)
    assert (found.residual < 1e-6).all() and (found.steps < 30).all()
    for i in range(PROBES):
        w, b = by_scipy(x, y[i], weights[i].astype(np.float64), l2)
        np.testing.assert_allclose(found.weight[i], w, **CLOSE)
        np.testing.assert_allclose(found.bias[i], b, **CLOSE)
    one = logistic(x, y[0], weights=weights[0], l2=l2)
    np.testing.assert_allclose(one.weight, found.weight[0], **CLOSE)
    np.testing.assert_allclose(
        found.margins(jnp.asarray(x))[0], x @ found.weight[0] + found.bias[0], rtol=1e-4, atol=1e-4
    )


def test_logistic__with_a_penalty_on_size__has_scipys_weights_and_its_zeros(data):
    x, y, weights = data
    found = logistic(x, y, weights=weights, l1=8.0, l2=1e-3)
    assert (found.residual < 1e-6).all()
    for i in range(PROBES):
        w, _ = by_scipy(x, y[i], weights[i].astype(np.float64), 1e-3, 8.0)
        np.testing.assert_allclose(
            found.weight[i], w, rtol=1e-4, atol=1e-4
        )  # L-BFGS-B stops at about 1e-5 itself
        np.testing.assert_array_equal(np.asarray(found.weight[i]) == 0, np.abs(w) < 1e-6)
    zeros = (np.asarray(found.weight) == 0).sum(1)
    assert (zeros > 0).all() and (zeros < D).all()


def test_logistic__of_one_number_per_class__equals_the_root_of_its_derivative(data):
    x = np.zeros((ROWS, D), np.float32)
    x[:, 3] = np.where(np.arange(ROWS) < ROWS / 2, 2, -2)
    found = logistic(
        x, np.stack([x[:, 3] > 0] * PROBES), weights=np.full((PROBES, ROWS), 1 / 12, np.float32), l2=3.0
    )
    root = 0.0  # of 3 w = 20 * 2 / (1 + exp(2 w)), by Newton's method
    for _ in range(50):
        p = 1 / (1 + np.exp(2 * root))
        root -= (3 * root - 40 * p) / (3 + 80 * p * (1 - p))
    np.testing.assert_allclose(
        found.weight, np.where(np.arange(D) == 3, root, 0)[None].repeat(PROBES, 0), **CLOSE
    )
    np.testing.assert_allclose(found.bias, np.zeros(PROBES), **CLOSE)


def test_logistic__weights_of_rows__are_repetitions_and_zeros_leave_out(data):
    x, y, _ = data
    times = np.arange(ROWS) % 3
    found = logistic(x, y, weights=np.broadcast_to(times, y.shape).astype(np.float32))
    repeated = logistic(np.repeat(x, times, 0), np.repeat(y, times, 1))
    np.testing.assert_allclose(found.weight, repeated.weight, **CLOSE)


def test_logistic__columns_of_zeros__change_no_other_weight(data):
    x, y, weights = data
    found = logistic(np.where(np.arange(D) < 4, x, 0), y, weights=weights)
    np.testing.assert_array_equal(found.weight[:, 4:], 0)
    few, _ = by_scipy(x[:, :4], y[0], weights[0].astype(np.float64), 1.0)
    np.testing.assert_allclose(found.weight[0, :4], few, **CLOSE)


def test_logistic__rows_that_can_be_separated__have_an_optimum_all_the_same(data):
    x, _, weights = data
    y = np.stack([x[:, i] > np.median(x[:, i]) for i in range(PROBES)])
    found = logistic(
        x, y, weights=weights, l2=1e-3
    )  # p - 1 has few digits here: steps made of it end nowhere
    assert (found.residual < 1e-6).all() and (found.steps < 60).all()
    assert ((found.margins(jnp.asarray(x)) > 0) == y).mean() > 0.99


@pytest.mark.slow
def test_logistic__far_more_columns_than_rows__converges():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 300)).astype(np.float32)
    y = x[:, 0] + rng.normal(size=40) > 0
    for options in ({"l2": 1.0}, {"l1": 0.5, "l2": 1e-4}):
        assert logistic(x, y, **options).residual < 1e-6


def test_logistic__new_numbers__compile_nothing(data, caplog):
    x, y, weights = data
    logistic(x, y, weights=weights, l2=1.0)
    with nothing_compiles(caplog):
        logistic(x[::-1], ~y, weights=weights[::-1], l2=0.3, tolerance=1e-5, steps=50)


@pytest.mark.slow
def test_optimum__under_vmap_over_rows_too__is_each_by_itself(data):
    x, y, weights = data
    xs = jnp.stack([jnp.asarray(x), 2 * jnp.asarray(x)])
    found = jax.jit(jax.vmap(lambda x: optimum(x, jnp.asarray(y[0]), jnp.asarray(weights[0]))))(xs)
    for i in range(2):
        np.testing.assert_allclose(found.weight[i], logistic(xs[i], y[0], weights=weights[0]).weight, **CLOSE)


def test_logistic__what_cannot_be_fitted__says_why(data, as_a_user):
    x, y, weights = data
    with pytest.raises(ShapeError, match=r"x has shape \(240, 12\).*y \(3, 239\)"):
        logistic(x, y[:, 1:])
    with pytest.raises(ShapeError, match="y as truth values"):
        logistic(x, y.astype(np.int32))
    with pytest.raises(ShapeError, match=r"weights \(240,\)"):
        logistic(x, y, weights=weights[0])
    with pytest.raises(ArgumentError, match="hold NaN or infinity, or a weight is negative"):
        logistic(np.where(np.arange(D) == 3, np.nan, x), y)
    with pytest.raises(ArgumentError, match="hold NaN or infinity, or a weight is negative"):
        logistic(x, y, weights=-weights)
    with pytest.raises(ArgumentError, match=r"l1=None, l2=0.*more than 0"):
        logistic(x, y, l2=0)
    with pytest.raises(ArgumentError, match=r"1 probes, first \[2\], have rows of one class only"):
        logistic(x, np.where(np.arange(PROBES)[:, None] == 2, True, y))
