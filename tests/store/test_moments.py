"""Moments: numpy's in double precision, however the rows are parted."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mechjax.store.moments import merged, moments_of, no_moments
from tests.store import small
from tests.tolerances import TOL


def far_from_zero(n=5000):
    rng = np.random.default_rng(0)
    spread = np.array([1e-2, 1.0, 30.0])
    return (1000 + spread * rng.standard_normal((n, 3))).astype(np.float32)


def close(found, rows, **tolerance):
    rows = rows.astype(np.float64)
    np.testing.assert_allclose(found.mean, rows.mean(0), **tolerance)
    np.testing.assert_allclose(found.variance, rows.var(0), **tolerance)
    np.testing.assert_allclose(found.second_moment, np.square(rows).mean(0), **tolerance)
    np.testing.assert_allclose(found.mean_square, np.square(rows).mean(), **tolerance)
    assert found.count == len(rows)


def test_moments__of_data_far_from_zero__are_those_of_numpy_in_double_precision():
    rows = far_from_zero()
    close(moments_of(rows), rows, **TOL["float64", "gradient"])


def test_moments__by_sums_of_squares__would_be_wrong():
    """The control: with sums kept in single precision nothing of the spread is left, and in double much is lost."""
    rows = far_from_zero()
    for dtype, worse in ((np.float32, 0.1), (np.float64, 1e-9)):
        x = rows.astype(dtype)
        naive = np.square(x).mean(0) - x.mean(0) ** 2
        assert np.abs(naive / rows.astype(np.float64).var(0) - 1).max() > worse


@settings(max_examples=30, deadline=None)
@given(cuts=st.lists(st.integers(0, 5000), max_size=6))
def test_moments__merged__are_those_of_all_rows(cuts):
    rows, edges = far_from_zero(), [0, *sorted(cuts), 5000]
    found = no_moments(3)
    for start, stop in pairwise(edges):
        found = merged(found, moments_of(rows[start:stop]))
    close(found, rows, **TOL["float64", "gradient"])


def test_moments__of_a_store__are_those_of_its_rows(whole):
    _, store = whole
    for site, layer in small.COLUMNS:
        close(
            store.moments(site, layer=layer),
            store.rows(slice(None), site, layer=layer),
            **TOL["float64", "gradient"],
        )


def test_moments__of_no_rows__are_zero():
    assert no_moments(3).mean_square == 0.0
    assert moments_of(np.zeros((0, 3), np.float32)).count == 0
