"""Sparse probing: against loops and scipy in float64, and where the answer is known."""

import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.dicteval import sparse_probing
from mechjax.dictionaries import ReLU
from tests.compilations import nothing_compiles
from tests.dicteval.by_hand import balanced
from tests.dictionaries.kinds import D, F, drawn
from tests.fit.by_scipy import by_scipy
from tests.tolerances import TOL

CLOSE = TOL["float32", "gradient"]
ROWS, KS = 240, (1, 2, 5)


@pytest.fixture(scope="module")
def data():
    """Three labels, uneven, of rows that overlap."""
    rng = np.random.default_rng(0)
    labels = rng.choice([2, 5, 9], ROWS, p=[0.5, 0.3, 0.2])
    x = rng.normal(size=(ROWS, D)) + 1.5 * rng.normal(size=(3, D))[np.searchsorted([2, 5, 9], labels)]
    return x.astype(np.float32), labels, rng.random(ROWS) < 0.3


@pytest.fixture(scope="module")
def found(data):
    x, labels, test = data
    return sparse_probing(drawn("top_k"), x, labels, test=test)


def measured(margins, y, weights):
    """Accuracy, F1 and area under the ROC curve, by their definitions."""
    said = margins > 0
    accuracy = (weights * (said == y)).sum() / weights.sum()
    f1 = 2 * (weights * (said & y)).sum() / ((weights * said).sum() + (weights * y).sum())
    ahead = np.sign(margins[y][:, None] - margins[~y][None]) / 2 + 0.5
    pairs = weights[y][:, None] * weights[~y][None]
    return accuracy, f1, (ahead * pairs).sum() / pairs.sum()


def test_sparse_probing__equals_loops_and_scipy(data, found):
    x, labels, test = data
    f = np.asarray(drawn("top_k").encode(jnp.asarray(x)), np.float64)
    assert found.classes == (2, 5, 9) and (found.residual < 1e-6).all()
    for c, name in enumerate(found.classes):
        y, fit, held_out = labels == name, balanced(labels, name, ~test), balanced(labels, name, test)
        row = 0
        for z in (f, x.astype(np.float64)):
            means = [(fit * side) @ z / (fit * side).sum() for side in (y, ~y)]
            order = np.argsort(-np.abs(means[0] - means[1]), kind="stable")
            if z is f:
                np.testing.assert_array_equal(found.latents[c], order[:5])
                np.testing.assert_allclose(found.difference[c], (means[0] - means[1])[order[:5]], **CLOSE)
            for k in (*KS, z.shape[1]):
                w, b = by_scipy(z[:, order[:k]], y, fit, 1.0)
                expected = measured(z[:, order[:k]] @ w + b, y, held_out)
                ours = [found.accuracy[row, c], found.f1[row, c], found.auroc[row, c]]
                np.testing.assert_allclose(
                    ours, expected, rtol=1e-3, atol=1e-3
                )  # ranks of rows that are almost tied
                row += 1
    assert found.probes[:4] == ("latents, k=1", "latents, k=2", "latents, k=5", "all latents")
    assert len(found.probes) == len(found.accuracy) == 8


def test_sparse_probing__labels_of_test_rows__change_no_probe(data, found):
    x, labels, test = data
    turned = np.where(test, np.roll(labels, 1), labels)
    turned[test] = np.random.default_rng(1).permutation(labels[test])
    again = sparse_probing(drawn("top_k"), x, turned, test=test)
    np.testing.assert_array_equal(again.latents, found.latents)
    np.testing.assert_allclose(again.difference, found.difference, **CLOSE)
    assert np.abs(again.accuracy - found.accuracy).max() > 0.1


def test_sparse_probing__a_latent_that_is_the_label__needs_one(data, caplog):
    """One latent for each label: its probe is right everywhere, and no coordinate's is."""
    _, labels, test = data
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    places = np.searchsorted([2, 5, 9], labels)
    f = np.concatenate([2 * np.eye(3)[places], rng.uniform(0, 3, (ROWS, D - 3))], 1).astype(np.float32)
    turned = (
        jnp.zeros((F, D)).at[:D].set(turn)
    )  # the others are silent: shapes, and so the program, are those above
    dictionary = ReLU(turned.T, jnp.zeros(F), turned, jnp.zeros(D), coefficient=jnp.zeros(()))
    known = sparse_probing(dictionary, f @ turn, labels, test=test)
    np.testing.assert_array_equal(known.latents[:, 0], [0, 1, 2])
    np.testing.assert_allclose(known.difference[:, 0], [2, 2, 2], rtol=1e-4)
    for measure in (known.accuracy, known.f1, known.auroc):
        np.testing.assert_allclose(measure[0], np.ones(3), **CLOSE)
    assert known.accuracy[4].mean() < 0.95  # one coordinate of the activations
    with nothing_compiles(caplog):
        sparse_probing(dictionary, -f @ turn, labels[::-1], test=~test, l2=0.5, k=(5, 3, 1))


def test_sparse_probing__where_nothing_can_be_read__is_at_chance_when_balanced(data):
    _, labels, test = data
    x = np.random.default_rng(3).normal(size=(ROWS, D)).astype(np.float32)
    even, plain = (sparse_probing(drawn("top_k"), x, labels, test=test, balanced=b) for b in (True, False))
    assert np.abs(np.asarray(even.accuracy) - 0.5).max() < 0.17
    y, fit = labels == 2, (~test).astype(np.float64)
    w, b = by_scipy(x.astype(np.float64), y, fit, 1.0)
    expected = measured(x @ w + b, y, test.astype(np.float64))
    np.testing.assert_allclose([plain.accuracy[7, 0], plain.f1[7, 0], plain.auroc[7, 0]], expected, rtol=1e-3)
