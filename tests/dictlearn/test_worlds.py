"""Worlds whose features are known: are they found again?

Twice as many random unit features as there are dimensions, four of them active on average. What to reach was measured
with SAELens 6.54, dictionary_learning and sparsify on the same world: TopK .93 to .95, BatchTopK .93, JumpReLU .99.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from mechjax.dictionaries import BatchTopK, JumpReLU, TopK
from mechjax.dictlearn import train

D, F, ACTIVE, BATCH = 64, 128, 4, 512


def world(seed, n_features=F, d_model=D, orthogonal=False):
    """Its features, and a function that draws tokens."""
    features = jax.random.normal(jax.random.key(seed), (n_features, d_model))
    if orthogonal:
        features = jnp.linalg.qr(features)[0]
    features /= jnp.linalg.norm(features, axis=-1, keepdims=True)

    @jax.jit
    def draw(key):
        there, size = jax.random.split(key)
        present = jax.random.uniform(there, (BATCH, n_features)) < ACTIVE / n_features
        sizes = jax.nn.relu(1 + 0.25 * jax.random.normal(size, present.shape))
        return jnp.where(present, sizes, 0) @ features

    return features, draw


def found(dictionary, features, x):
    """Mean cosine of features and latents, matched one to one, the part of the variance explained, and L0."""
    cosines = np.asarray(dictionary.W_dec / dictionary.decoder_norms()[:, None] @ features.T)
    matched = np.abs(cosines)[linear_sum_assignment(-np.abs(cosines))].mean()
    f = dictionary.encode(x)
    unexplained = jnp.square(x - dictionary.decode(f)).sum() / jnp.square(x - x.mean(0)).sum()
    return matched, 1 - float(unexplained), float((f != 0).sum(-1).mean())


KINDS = {
    "top_k": lambda **o: TopK.init(k=ACTIVE, **o),
    "batch_top_k": lambda **o: BatchTopK.init(k=ACTIVE, **o),
    # the penalty, threshold and bandwidth that SAELens was given, in units of mean square 1
    "jump_relu": lambda **o: JumpReLU.init(coefficient=0.48, threshold=0.4, bandwidth=0.8, **o),
}


def trained(kind, seed, steps, n_features=F, d_model=D, orthogonal=False, **how):
    features, draw = world(seed, n_features, d_model, orthogonal)
    fresh, drawn, held_out = jax.random.split(jax.random.key(100 + seed), 3)
    dictionary = KINDS[kind](d_model=d_model, n_features=n_features, key=fresh)
    out = train(
        dictionary, (draw(key) for key in jax.random.split(drawn, steps)), steps=steps, learning_rate=3e-3,
        key=fresh, dead_after=200 * BATCH, steps_per_call=100, **how,
    )  # fmt: skip
    x = jnp.concatenate([draw(key) for key in jax.random.split(held_out, 20)])
    return found(out.dictionary, features, x)


@pytest.mark.slow
def test_worlds__of_known_features__are_found_by_every_kind():
    scores = {kind: trained(kind, seed=0, steps=1500) for kind in KINDS}
    least = {"top_k": 0.92, "batch_top_k": 0.9, "jump_relu": 0.95}  # one seed, a short run
    assert all(scores[kind][0] >= least[kind] for kind in KINDS), scores
    explained = {kind: explained for kind, (_, explained, _) in scores.items()}
    assert min(explained["jump_relu"], explained["batch_top_k"]) > explained["top_k"] + 0.03, scores
    assert explained["top_k"] > 0.8, scores
    assert all(abs(l0 - ACTIVE) < 1 for _, _, l0 in scores.values()), scores


@pytest.mark.slow
def test_worlds__median_of_three_seeds__is_as_good_as_the_peers():
    for kind, least in {"top_k": 0.93, "batch_top_k": 0.91, "jump_relu": 0.97}.items():
        scores = np.array([trained(kind, seed, steps=4000) for seed in range(3)])
        assert np.median(scores[:, 0]) >= least, (kind, scores)
        assert np.abs(scores[:, 2] - ACTIVE).max() < 1, (kind, scores)


@pytest.mark.slow
def test_worlds__of_orthogonal_features__are_found_whole():
    """By plain Adam: with unit gradients one or two of 128 stay shared by two latents (.98)."""
    sizes = {"n_features": 128, "d_model": 128, "orthogonal": True}
    scores = [trained("top_k", seed, steps=4000, unit_gradients=False, **sizes) for seed in range(3)]
    assert np.median(scores, axis=0)[0] >= 0.99, scores
