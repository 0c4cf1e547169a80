"""The penalty that begins as L1: how its exponent falls, and what a naive power gets wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries import PAnneal, ReLU, Stage
from mechjax.dictionaries.p_anneal import powers
from mechjax.dictlearn import train
from tests.dictionaries.kinds import D, F, tokens
from tests.dictlearn.test_worlds import found, world
from tests.tolerances import TOL

KEY = jax.random.key(0)


def fresh(**options):
    return PAnneal.init(d_model=D, n_features=F, key=KEY, coefficient=0.3, **options)


def at(progress):
    late = Stage.late(F)
    return Stage(late.dead, late.sparsity, jnp.float32(progress))


def test_powers__at_zero__have_a_finite_gradient_where_a_naive_one_has_none():
    f, p = jnp.array([[0.0, 0.5, 2.0]]), jnp.float32(0.2)
    np.testing.assert_allclose(powers(f, p), 0.5**0.2 + 2**0.2, **TOL["float32", "law"])
    grad = jax.grad(powers)(f, p)
    np.testing.assert_allclose(grad, [[0, 0.2 * 0.5**-0.8, 0.2 * 2**-0.8]], **TOL["float32", "law"])
    naive = jax.grad(lambda f: jnp.where(f > 0, f**p, 0).sum())(f)
    assert not np.isfinite(naive[0, 0])


def test_loss__is_the_error_and_the_power_that_the_run_has_come_to():
    dictionary, x = fresh(), tokens()
    f = np.asarray(dictionary.encode(x), np.float64)
    error = np.square(np.asarray(x) - np.asarray(dictionary(x))).sum(-1).mean()
    for progress, p in [(0.0, 1.0), (0.05, 1.0), (0.15, 1 - 0.8 / 9), (0.95, 0.2), (1.0, 0.2)]:
        of = eqx.tree_at(lambda d: d.p, dictionary, jnp.float32(p))  # where a run that came here is
        value, outcome = of.loss(x, x, at(progress), None)
        naive = 0.3 * np.where(f > 0, f**p, 0).sum(-1).mean()
        np.testing.assert_allclose(outcome.squared_error, error, **TOL["float32", "layout"])
        np.testing.assert_allclose(value, error + naive, **TOL["float32", "layout"])
        np.testing.assert_allclose(outcome.held, [p, 1.0], **TOL["float32", "law"])


def test_loss__where_the_exponent_falls__does_not_jump_and_keeps_its_share():
    dictionary, x = fresh(parts=2), tokens()
    before = dictionary.loss(x, x, at(0.4), None)
    after = dictionary.loss(x, x, at(0.6), None)
    np.testing.assert_allclose(after[0], before[0], **TOL["float32", "layout"])
    dictionary = dictionary.observed(after[1])
    f = np.asarray(dictionary.encode(x), np.float64)
    share = f.sum() / (f[f > 0] ** 0.2).sum()
    np.testing.assert_allclose([dictionary.p, dictionary.share], [0.2, share], **TOL["float32", "layout"])
    other = tokens(1)
    g = np.asarray(dictionary.encode(other), np.float64)
    expected = 0.3 * share * np.where(g > 0, g**0.2, 0).sum(-1).mean()
    part = dictionary.loss(other, other, at(0.7), None)[1].parts["sparsity"]
    np.testing.assert_allclose(part, expected, **TOL["float32", "layout"])
    assert abs(expected / 0.3 - g.sum(-1).mean()) > 1e-3  # and no more that of L1


def test_loss__of_nothing_active__is_finite():
    low = eqx.tree_at(lambda d: d.b_enc, fresh(), jnp.full(F, -100.0))
    (value, outcome), grads = eqx.filter_value_and_grad(
        lambda d: d.loss(tokens(), tokens(), at(0.9), None), has_aux=True
    )(low)
    assert np.isfinite(value) and float(low.observed(outcome).share) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_loss__in_other_units__keeps_the_shares_of_its_parts():
    dictionary, x = fresh(first=0.5, last=0.5), tokens()
    value = dictionary.loss(x, x, at(1.0), None)[0]
    larger = dictionary.scaled(3.0, 3.0).loss(3 * x, 3 * x, at(1.0), None)[0]
    np.testing.assert_allclose(larger, 9 * value, **TOL["float32", "layout"])


@pytest.mark.slow
def test_train__with_a_falling_exponent__explains_more_than_l1_with_as_many_latents():
    features, draw = world(0)
    batches = [draw(key) for key in jax.random.split(KEY, 1000)]
    run = lambda kind, **o: train(
        kind.init(d_model=64, n_features=128, key=jax.random.key(7), **o), batches, steps=1000, learning_rate=3e-3, key=KEY,
        steps_per_call=100,
    )  # fmt: skip
    annealed = run(PAnneal, coefficient=1.5)
    plain = run(ReLU, coefficient=3.5, penalty="l1")
    x = jnp.concatenate(batches[:10])
    (matched, explained, l0), (_, l1_explained, l1_l0) = (
        found(o.dictionary, features, x) for o in (annealed, plain)
    )
    np.testing.assert_allclose(annealed.dictionary.p, 0.2, **TOL["float32", "law"])
    assert annealed.history["loss"][-1] < 0.5 * annealed.history["loss"][0]
    assert matched > 0.85, (matched, explained, l0)
    assert l0 < l1_l0 + 0.2 and explained > l1_explained + 0.1, (matched, explained, l0, l1_explained, l1_l0)


def test_init__of_exponents_that_rise__says_that_they_fall():
    with pytest.raises(ArgumentError, match=r"first=0.5, last=0.9.*exponents fall"):
        fresh(first=0.5, last=0.9)
