"""Matching pursuit, against steps one by one in numpy."""

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.records import restore, save
from mechjax.dictionaries import MatchingPursuit, Stage, TopK
from mechjax.dictlearn import train, train_many
from tests.dictionaries.kinds import B, D, F, tokens
from tests.dictlearn.test_worlds import found, world
from tests.tolerances import TOL

KEY = jax.random.key(0)


def pursuit(k=5, seed=0, n_features=F):
    fresh = MatchingPursuit.init(d_model=D, n_features=n_features, k=k, key=jax.random.key(seed))
    return eqx.tree_at(lambda d: d.b_dec, fresh, 0.1 * jax.random.normal(jax.random.key(seed + 1), (D,)))


def by_steps(dictionary, x):
    """Latents and what is left over, token by token and step by step."""
    W, b = np.asarray(dictionary.W_dec, np.float64), np.asarray(dictionary.b_dec, np.float64)
    f, left = np.zeros((len(x), len(W))), np.asarray(x, np.float64) - b
    for r, own in zip(left, f, strict=True):
        for _ in range(dictionary.k):
            i = int((W @ r).argmax())
            if (value := W[i] @ r) > 0:
                own[i] += value
                r[:] = r - value * W[i]
    return f, left


def test_matching_pursuit__equals_steps_one_by_one():
    dictionary, x = pursuit(), tokens()
    f, left = by_steps(dictionary, x)
    np.testing.assert_allclose(dictionary.encode(x), f, **TOL["float32", "layout"])
    np.testing.assert_allclose(x - dictionary(x), left, **TOL["float32", "layout"])
    np.testing.assert_allclose(
        dictionary.encode(x.reshape(4, -1, D)).reshape(B, F), f, **TOL["float32", "layout"]
    )
    np.testing.assert_allclose(dictionary.encode(x[2]), f[2], **TOL["float32", "layout"])
    assert (dictionary.n_features, dictionary.d_model) == (F, D)


def test_matching_pursuit__each_step__leaves_less():
    errors = [float(jnp.square(tokens() - pursuit(k)(tokens())).sum()) for k in range(1, 8)]
    assert all(b < a for a, b in pairwise(errors))


def test_loss__is_what_the_last_step_leaves_over():
    dictionary, x = pursuit(), tokens()
    f, left = by_steps(dictionary, x)
    value, outcome = dictionary.loss(x, x, Stage.late(F), dictionary.select(x, Stage.late(F)))
    spread = np.square(np.asarray(x) - np.asarray(x).mean(0)).sum(-1).mean()
    np.testing.assert_allclose(value, np.square(left).sum(-1).mean() / spread, **TOL["float32", "layout"])
    np.testing.assert_array_equal(outcome.fired, (f > 0).sum(0))  # a latent that is met twice is one
    np.testing.assert_allclose(outcome.l0, (f > 0).sum(-1).mean(), **TOL["float32", "law"])


def test_select__meets_a_latent_twice__and_adds_both():
    dictionary, x = pursuit(k=12, n_features=14), tokens()
    at = dictionary.select(x, Stage.late(14))
    twice = [len(set(row)) < 12 for row in np.asarray(at.codes.indices)]
    assert any(twice)
    np.testing.assert_allclose(dictionary.encode(x), by_steps(dictionary, x)[0], **TOL["float32", "layout"])


def test_gradients__equal_finite_differences_with_the_choice_held():
    with jax.enable_x64(True):
        dictionary = jax.tree.map(lambda a: a.astype(jnp.float64), pursuit())
        x = tokens().astype(jnp.float64)
        at = Stage.late(F, jnp.float64)
        given = dictionary.select(x, at)
        loss = lambda d: d.loss(x, x, at, given)[0]
        grad = eqx.filter_grad(loss)(dictionary)
        for of in ("W_dec", "b_dec"):
            along = jax.random.normal(KEY, getattr(dictionary, of).shape, jnp.float64)
            moved = lambda h, of=of, along=along: eqx.tree_at(
                lambda d: getattr(d, of), dictionary, getattr(dictionary, of) + h * along
            )
            slope = (loss(moved(1e-6)) - loss(moved(-1e-6))) / 2e-6
            np.testing.assert_allclose((getattr(grad, of) * along).sum(), slope, rtol=1e-6)
            free = (dictionary.loss(x, x, at, None)[0] - loss(dictionary)) == 0  # the choice is found anew
            assert bool(free)


def test_matching_pursuit__in_other_units_and_restored__is_the_same(tmp_path):
    dictionary, x = pursuit(), tokens()
    larger = dictionary.scaled(2.5, 2.5)
    np.testing.assert_allclose(larger(2.5 * x), 2.5 * dictionary(x), **TOL["float32", "layout"])
    np.testing.assert_allclose(larger.encode(2.5 * x), 2.5 * dictionary.encode(x), **TOL["float32", "layout"])
    save(dictionary, tmp_path)
    np.testing.assert_array_equal(restore(tmp_path)(x), dictionary(x))


@pytest.mark.slow
def test_train__of_matching_pursuit__makes_more_of_a_world_than_top_k():
    features, draw = world(0)
    batches = [draw(key) for key in jax.random.split(KEY, 400)]
    run = lambda kind: train(
        kind.init(d_model=64, n_features=128, k=4, key=jax.random.key(7)), batches, steps=400, learning_rate=3e-3, key=KEY,
        steps_per_call=100,
    )  # fmt: skip
    x = jnp.concatenate(batches[:10])
    greedy, plain = run(MatchingPursuit), run(TopK)
    (matched, explained, l0), (_, other, _) = (found(o.dictionary, features, x) for o in (greedy, plain))
    assert greedy.history["loss"][-1] < 0.5 * greedy.history["loss"][0]
    np.testing.assert_allclose(greedy.dictionary.decoder_norms(), np.ones(128), **TOL["float32", "law"])
    assert matched > 0.8 and explained > other and l0 <= 4, (matched, explained, other, l0)


def test_train_many__of_matching_pursuit__is_each_alone():
    given = {"steps": 3, "learning_rate": 1e-3}
    batches = [tokens(i) for i in range(3)]
    many = train_many([pursuit(), pursuit(seed=4)], batches, **given)
    alone = train(pursuit(seed=4), batches, key=KEY, **given)
    np.testing.assert_allclose(many[1].history["loss"], alone.history["loss"], **TOL["float32", "gradient"])


def test_matching_pursuit__of_what_does_not_fit__says_what_does():
    with pytest.raises(ArgumentError, match="k=9 of n_features=8"):
        MatchingPursuit.init(d_model=4, n_features=8, k=9, key=KEY)
    with pytest.raises(ShapeError, match=r"shape \(4, 11\).*reads vectors of length 12"):
        pursuit().encode(jnp.zeros((4, 11)))
    with pytest.raises(ArgumentError, match="dead latents of a MatchingPursuit cannot be begun anew"):
        train(pursuit(), [], steps=3, resample_at=[1], learning_rate=1e-3, key=KEY)
