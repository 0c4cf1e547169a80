"""Toy models of superposition: shapes that are known."""

import jax
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.studies.superposition import superposition
from tests.tolerances import TOL

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def pentagon():
    return superposition(5, 2, sparsity=0.9, key=KEY, n_instances=8, steps=4000)


def test_superposition__of_five_sparse_features_in_a_plane__is_a_pentagon(pentagon):
    around = np.sort(np.degrees(np.arctan2(pentagon.W[:, 1], pentagon.W[:, 0])))
    gaps = np.diff([*around, around[0] + 360])
    assert np.abs(gaps - 72).max() < 2, gaps
    assert np.abs(np.linalg.norm(pentagon.W, axis=-1) - 1).max() < 0.25
    np.testing.assert_allclose(pentagon.dimensionality, np.full(5, 2 / 5), atol=0.05)
    assert abs(float(pentagon.dimensionality.sum()) - 2) < 0.05
    np.testing.assert_allclose(np.diag(pentagon.angles()), np.zeros(5), atol=1e-3)
    assert np.abs(np.sort(pentagon.angles()[0])[1:] - [72, 72, 144, 144]).max() < 4


def test_superposition__of_dense_features__keeps_the_first_at_right_angles():
    found = superposition(5, 2, sparsity=0.0, importance=0.7, key=KEY, n_instances=4, steps=2000, batch=512)
    lengths = np.linalg.norm(found.W, axis=-1)
    assert lengths[:2].min() > 0.9 and lengths[2:].max() < 0.1, lengths
    assert abs(found.angles()[0, 1] - 90) < 2


def test_dimensionality__equals_its_definition(pentagon):
    W = np.asarray(pentagon.W, np.float64)
    lengths = np.linalg.norm(W, axis=-1)
    expected = lengths**2 / np.square((W / lengths[:, None]) @ W.T).sum(-1)
    np.testing.assert_allclose(pentagon.dimensionality, expected, **TOL["float32", "layout"])


def test_superposition__of_numbers_that_cannot_be__says_which():
    with pytest.raises(ArgumentError, match=r"sparsity=1\.0"):
        superposition(5, 2, sparsity=1.0, key=KEY)
    with pytest.raises(ArgumentError, match="n_features=0"):
        superposition(0, 2, sparsity=0.5, key=KEY)
