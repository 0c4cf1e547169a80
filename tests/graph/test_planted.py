"""Planted circuits: what their edges do, against all others."""

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.graph import planted
from tests.cut_edges import cut_one_by_one
from tests.tolerances import TOL

INSIDE, OUTSIDE = 1.4, 0.15
"""Of the metric: what every planted edge does at least, and any other at most, at the default noise."""


def effects(truth, which=None):
    found = cut_one_by_one(truth.model, truth.clean, truth.corrupt, truth.metric, truth.graph, which)
    return found.mean(-1)


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 5))])
def test_planted__two_layers_of_four_heads__all_edges_are_apart_by_the_stated_gap(seed):
    truth = planted(2, 4, key=jax.random.key(seed))
    found, varying = effects(truth), np.asarray(truth.varying)
    assert varying.sum() == 3 * 3
    assert not np.any(truth.constant & ~truth.circuit)
    assert found[varying].min() > INSIDE
    assert 0.01 < np.abs(found[~varying]).max() < OUTSIDE
    silent = planted(2, 4, key=jax.random.key(seed), noise=0.0)
    np.testing.assert_array_equal(silent.circuit, truth.circuit)
    found = effects(silent)
    assert found[varying].min() > INSIDE
    assert_allclose(found[~varying], 0, **TOL["float32", "parity"])


@pytest.mark.slow
def test_planted__exact_scores__are_apart_by_the_stated_gap():
    truth = planted(2, 4, key=jax.random.key(0))
    found = mj.attribution.exact(truth.model, truth.clean, truth.corrupt, truth.metric, graph=truth.graph)
    assert_allclose(found.scores, effects(truth), **TOL["float32", "sweep"])


@pytest.mark.slow
@pytest.mark.parametrize(("n_layers", "n_heads", "n_edges"), [(6, 8, 3628), (12, 12, 32491)])
def test_planted__larger_models__are_apart_on_the_circuit_what_is_nearest_and_a_sample(
    n_layers, n_heads, n_edges
):
    truth = planted(n_layers, n_heads, key=jax.random.key(0))
    varying, table = np.asarray(truth.varying), truth.graph.table
    assert len(varying) == n_edges
    assert varying.sum() == 3 * (n_layers + 1)
    near = np.isin(table[:, 0], table[varying, 0]) & np.isin(table[:, 1], table[varying, 1])
    sample = np.random.default_rng(0).choice(n_edges, 200)
    which = np.unique([*np.flatnonzero(varying | near), *sample])
    found, inside = effects(truth, which), varying[which]
    assert found[inside].min() > INSIDE
    assert np.abs(found[~inside]).max() < OUTSIDE


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("n_layers", "n_heads"), [(6, 8), (12, 12)])
def test_planted__larger_models__all_edges_are_apart_by_the_stated_gap(n_layers, n_heads):
    truth = planted(n_layers, n_heads, key=jax.random.key(0))
    found = mj.attribution.exact(truth.model, truth.clean, truth.corrupt, truth.metric, graph=truth.graph)
    scores, varying = np.asarray(found.scores), np.asarray(truth.varying)
    assert scores[varying].min() > INSIDE
    assert np.abs(scores[~varying]).max() < OUTSIDE


def test_planted__of_sizes_that_do_not_fit__is_explained(as_a_user):
    key = jax.random.key(0)
    with pytest.raises(
        ArgumentError, match=r"n_paths=9 of length=2 do not fit 2 layers of 4 heads and an MLP"
    ):
        planted(2, 4, key=key, n_paths=9)
    with pytest.raises(
        ArgumentError, match=r"d_model=7 has no room for 3 paths of 2 nodes, which need 8 directions"
    ):
        planted(2, 4, key=key, d_model=7)
    with pytest.raises(ArgumentError, match="noise=-1: give a factor on random weights, from 0"):
        planted(2, 4, key=key, noise=-1.0)
    with pytest.raises(ArgumentError, match="n_layers=0: give a whole number from 1"):
        planted(0, 4, key=key)
