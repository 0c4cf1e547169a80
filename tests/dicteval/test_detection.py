"""Detection: counts by a loop over samples, SAELens' own scores, and what a dictionary is worth whose truth is known."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dicteval import detection, recovery
from mechjax.dictionaries import ReLU
from tests.dictionaries.kinds import F, drawn, tokens
from tests.tolerances import TOL

ORACLE = Path(__file__).parents[1] / "oracles" / "synthetic_world.npz"
KNOWN = 9


@pytest.fixture(scope="module")
def given():
    """A dictionary, samples in ragged batches, and features some of which are its latents."""
    dictionary = drawn("top_k")
    features = np.array(jax.random.normal(jax.random.key(3), (KNOWN, dictionary.d_model)))
    features[:4] = np.asarray(dictionary.W_dec)[:4] * np.array([[2.0], [-1.0], [1.0], [0.5]])
    rng = np.random.default_rng(0)
    batches = []
    for seed, n in enumerate((30, 30, 11)):
        x = tokens(seed, n)
        noise = rng.random((n, KNOWN)) < 0.3
        noise[:, :4] ^= np.asarray(dictionary.encode(x))[:, :4] != 0
        batches.append((x, np.where(noise, rng.random(noise.shape), 0).astype(np.float32)))
    return dictionary, batches, jnp.asarray(features)


def by_hand(dictionary, batches, features):
    """Precision, recall and F1 of each latent, one sample and one latent at a time."""
    rows, known = (np.asarray(z, np.float64) for z in (dictionary.W_dec, features))
    scores = []
    for latent, row in enumerate(rows):
        sizes = [abs(row @ f) / np.linalg.norm(row) / np.linalg.norm(f) for f in known]
        own, hits, alarms, misses = int(np.argmax(sizes)), 0, 0, 0
        for x, activations in batches:
            for f, there in zip(
                np.asarray(dictionary.encode(x))[:, latent], activations[:, own] > 0, strict=True
            ):
                hits += f != 0 and there
                alarms += f != 0 and not there
                misses += f == 0 and there
        precision = hits / (hits + alarms) if hits + alarms else 0
        recall = hits / (hits + misses) if hits + misses else 0
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
        scores.append((own, max(sizes), precision, recall, f1))
    return map(np.array, zip(*scores, strict=True))


def test_detection__of_ragged_batches__equals_a_loop_over_samples(given):
    found = detection(*given)
    own, cosine, precision, recall, f1 = by_hand(*given)
    np.testing.assert_array_equal(found.matched, own)
    np.testing.assert_allclose(found.cosine, cosine, **TOL["float32", "parity"])
    np.testing.assert_allclose(found.precision, precision, **TOL["float32", "law"])
    np.testing.assert_allclose(found.recall, recall, **TOL["float32", "law"])
    np.testing.assert_allclose(found.f1, f1, **TOL["float32", "law"])
    np.testing.assert_allclose(found.unique, len(set(own)) / F, **TOL["float32", "law"])
    assert int(found.tokens) == 71
    assert f1.mean() > 0.05 and (f1 == 0).any() and (np.abs(precision - recall) > 0.05).any()


def test_detection__of_saelens_directions_and_firings__is_saelens_own():
    # The same draws as in tests/oracles/make_synthetic_world.py; a dictionary of samples that are their own latents.
    n_features, known, d, n = 40, 150, 24, 3000
    rng = np.random.default_rng(11)
    features = rng.standard_normal((known, d)).astype(np.float32)
    rows = features[:n_features] * rng.choice([-1, 1], (n_features, 1)) + rng.normal(0, 0.4, (n_features, d))
    rows = rows.astype(np.float32)
    rows[5] = rows[4]
    activations = np.where(rng.random((n, known)) < 0.2, rng.random((n, known)), 0).astype(np.float32)
    latents = activations[:, :n_features] * (rng.random((n, n_features)) < 0.8)
    latents = np.where(rng.random((n, n_features)) < 0.05, 1, latents).astype(np.float32)
    latents[:, 7] = 0
    dictionary = ReLU(
        jnp.eye(n_features), jnp.zeros(n_features), jnp.asarray(rows), jnp.zeros(d), coefficient=jnp.zeros(()),
        centred=False,
    )  # fmt: skip
    found = detection(dictionary, [(latents, activations)], jnp.asarray(features))
    f1, precision, recall, unique, mcc = np.load(ORACLE)["scores"]
    ours = [found.f1.mean(), found.precision.mean(), found.recall.mean(), found.unique]
    np.testing.assert_allclose(ours, [f1, precision, recall, unique], **TOL["float32", "parity"])
    measured = recovery(dictionary, jnp.asarray(features))
    np.testing.assert_allclose(measured.mcc, mcc, **TOL["float32", "parity"])
    assert unique > float(measured.unique)  # two latents of one feature: one of them counts, or none


def test_detection__of_the_features_themselves__is_whole_and_of_a_dead_latent_nothing():
    features = jnp.eye(6)
    a = np.where(np.random.default_rng(0).random((200, 6)) < 0.3, 1.0, 0.0).astype(np.float32)
    of = lambda rows, b: ReLU(rows.T, b, rows, jnp.zeros(6), coefficient=jnp.zeros(()))
    whole = detection(of(features, jnp.zeros(6)), [(a, a)], features)
    np.testing.assert_array_equal(np.stack([whole.f1, whole.precision, whole.recall]), np.ones((3, 6)))
    np.testing.assert_array_equal(whole.matched, np.arange(6))
    dead = detection(of(features, jnp.zeros(6).at[2].set(-9.0)), [(a, a)], features)
    np.testing.assert_array_equal(dead.f1, [1, 1, 0, 1, 1, 1])
    np.testing.assert_array_equal(dead.precision, dead.f1)
    never = detection(of(features, jnp.zeros(6)), [(a, np.zeros_like(a))], features)
    np.testing.assert_array_equal(np.stack([never.f1, never.precision, never.recall]), np.zeros((3, 6)))


def test_detection__of_what_does_not_fit__says_what_would(given):
    dictionary, batches, features = given
    with pytest.raises(ArgumentError, match="`batches` holds no sample"):
        detection(dictionary, [], features)
    with pytest.raises(
        ShapeError, match=r"features have shape \(9, 3\).*vectors of length 12: give \(known, 12\)"
    ):
        detection(dictionary, batches, features[:, :3])
    x, activations = batches[0]
    with pytest.raises(ShapeError, match=r"shape \(30, 8\) beside 30 samples and 9 features: give \(30, 9\)"):
        detection(dictionary, [(x, activations[:, :8])], features)
