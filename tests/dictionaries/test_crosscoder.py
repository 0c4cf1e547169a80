"""Crosscoders, against loops over sites in numpy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.records import restore, save
from mechjax.dictionaries import (
    BatchTopK,
    Crosscoder,
    Gated,
    JumpReLU,
    PAnneal,
    ReLU,
    Stage,
    Switch,
    TopK,
)
from mechjax.dictlearn import train, train_many
from tests.tolerances import TOL

S, D, F, B = 3, 5, 14, 18
KEY = jax.random.key(0)
KINDS = {
    "relu": {"coefficient": 0.7},
    "batch_top_k": {"kind": BatchTopK, "k": 3},
    "top_k": {"kind": TopK, "k": 3},
    "gated": {"kind": Gated},
    "p_anneal": {"kind": PAnneal, "first": 0.5, "last": 0.5},
    "jump_relu": {"kind": JumpReLU, "threshold": 0.5, "bandwidth": 0.5},
}
each = pytest.mark.parametrize("name", KINDS)


def crosscoder(name="relu", seed=0):
    """One whose biases are drawn too."""
    fresh = Crosscoder.init(n_sites=S, d_model=D, n_features=F, key=jax.random.key(seed), **KINDS[name])
    keys = iter(jax.random.split(jax.random.key(seed + 1), 9))
    moved = {"b_enc", "b_dec", "W_dec"} if name == "relu" else {"b_enc", "b_dec"}
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x + 0.2 * jax.random.normal(next(keys), x.shape, x.dtype) if path[-1].name in moved else x
        ),
        fresh,
    )


def data(seed=0, n=B):
    return jax.random.normal(jax.random.key(50 + seed), (n, S, D)) + 0.2


def test_crosscoder__equals_a_loop_over_sites():
    c, x = crosscoder(), data()
    W_enc, W_dec, b_dec = (np.asarray(a, np.float64) for a in (c.W_enc, c.W_dec, c.b_dec))
    assert W_enc.shape == (S, D, F) and W_dec.shape == (F, S, D) and b_dec.shape == (S, D)
    z = sum(np.asarray(x)[:, s] @ W_enc[s] for s in range(S)) + np.asarray(c.dictionary.b_enc)
    f = np.maximum(z, 0)
    made = np.stack([f @ W_dec[:, s] + b_dec[s] for s in range(S)], 1)
    np.testing.assert_allclose(c.encode(x), f, **TOL["float32", "layout"])
    np.testing.assert_allclose(c(x), made, **TOL["float32", "layout"])
    np.testing.assert_allclose(c.decode(c.encode(x[3])), made[3], **TOL["float32", "layout"])
    np.testing.assert_allclose(c(x.reshape(2, 9, S, D)).reshape(B, S, D), c(x), **TOL["float32", "law"])

    error = sum(np.square(np.asarray(x)[:, s] - made[:, s]).sum(-1).mean() for s in range(S))
    penalty = 0.7 * sum(f[:, i].mean() * np.linalg.norm(W_dec[i, s]) for i in range(F) for s in range(S))
    flat = x.reshape(B, -1)
    value, outcome = c.dictionary.loss(flat, flat, Stage.late(F), None)
    np.testing.assert_allclose(outcome.squared_error, error, **TOL["float32", "layout"])
    np.testing.assert_allclose(value, error + penalty, **TOL["float32", "layout"])
    whole = penalty * np.inner(
        f.mean(0), np.linalg.norm(W_dec.reshape(F, -1), axis=-1)
    )  # norms of whole rows
    assert abs(whole - penalty) > 0.1  # are another penalty


@each
def test_crosscoder__in_other_units_at_each_site__is_the_same(name):
    c, x = crosscoder(name), data()
    s = jnp.array([2.0, 0.5, 30.0])
    larger = c.scaled(s, s)
    np.testing.assert_allclose(larger(s[:, None] * x) / s[:, None], c(x), **TOL["float32", "layout"])
    np.testing.assert_allclose(
        larger.encode(s[:, None] * x), s.mean() * c.encode(x), **TOL["float32", "gradient"]
    )
    even = c.scaled(4.0, 4.0)
    np.testing.assert_array_equal(even(4 * x), 4 * c(x))
    back = larger.scaled(1 / s, 1 / s)
    np.testing.assert_allclose(back(x), c(x), **TOL["float32", "layout"])


@each
def test_crosscoder__saved_and_restored__is_the_same(name, tmp_path):
    save(crosscoder(name), tmp_path)
    np.testing.assert_array_equal(restore(tmp_path)(data()), crosscoder(name)(data()))


def test_relative_norms__say_which_site_has_a_latent():
    c = crosscoder()
    W = c.W_dec.at[0, 0].set(0).at[1, 2].set(0).at[2].set(0)
    c = eqx.tree_at(lambda c: c.dictionary.W_dec, c, W.reshape(F, -1))
    found = np.asarray(c.relative_norms(0, 2))
    a, b = np.linalg.norm(W[:, 0], axis=-1), np.linalg.norm(W[:, 2], axis=-1)
    np.testing.assert_array_equal(found[:3], [1, 0, 0.5])
    np.testing.assert_allclose(found[3:], b[3:] / (a + b)[3:], **TOL["float32", "law"])
    s = jnp.array([1.0, 5.0, 100.0])
    np.testing.assert_allclose(
        c.scaled(s, s).relative_norms(0, 2, scale=s), found, **TOL["float32", "layout"]
    )
    with pytest.raises(ArgumentError, match="site 3: this crosscoder has the sites 0 to 2"):
        c.relative_norms(0, 3)


def world(n, sizes=(1.0, 50.0)):
    """Two models: eight features that both have, in other directions, and four that each has alone."""
    features = jax.random.normal(KEY, (2, 16, 16))
    features = jnp.linalg.qr(features)[0]
    has = jnp.ones((2, 16)).at[1, 8:12].set(0).at[0, 12:].set(0)

    def draw(key):
        there, size = jax.random.split(key)
        a = jnp.where(jax.random.uniform(there, (256, 16)) < 0.1, 1 + jax.random.uniform(size, (256, 16)), 0)
        return jnp.einsum("bf,sf,sfd,s->bsd", a, has, features, jnp.array(sizes))

    return features, [draw(key) for key in jax.random.split(jax.random.key(9), n)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["relu", "batch_top_k"])
def test_train__of_a_crosscoder__finds_what_is_shared_and_what_is_not(kind):
    features, batches = world(1500)
    given = {"relu": {"coefficient": 0.5}, "batch_top_k": {"kind": BatchTopK, "k": 2}}[kind]
    c = Crosscoder.init(n_sites=2, d_model=16, n_features=24, key=KEY, **given)
    out = train(c, batches, steps=1500, learning_rate=5e-3, key=KEY, steps_per_call=100, dead_after=256 * 100)
    assert isinstance(out.dictionary, Crosscoder) and out.scale.shape == (2, 2)
    np.testing.assert_allclose(out.scale[0, 1] / out.scale[0, 0], 50, rtol=0.05)
    assert out.history["loss"][-1] < 0.5 * out.history["loss"][0]
    x = batches[0]
    error = jnp.square((out.dictionary(x) - x) / out.scale[0][:, None]).sum()
    assert error / jnp.square((x - x.mean(0)) / out.scale[0][:, None]).sum() < 0.3
    share = out.dictionary.relative_norms(0, 1, scale=out.scale[0])
    rows = out.dictionary.W_dec / out.scale[0][:, None]
    for i, expected in [(0, 0.5), (3, 0.5), (9, 0.0), (14, 1.0)]:
        own = jnp.concatenate([features[0, i] * float(expected < 1), features[1, i] * float(expected > 0)])
        cosines = (
            rows.reshape(24, -1) @ own / jnp.linalg.norm(rows.reshape(24, -1), axis=-1) / jnp.linalg.norm(own)
        )
        assert float(cosines.max()) > 0.9, (i, cosines)
        assert abs(float(share[cosines.argmax()]) - expected) < 0.15, (i, share)


@each
def test_train__of_a_crosscoder__is_that_of_its_sites_side_by_side(name, tmp_path):
    batches = [data(i) for i in range(4)]
    given = {"steps": 4, "learning_rate": 1e-3, "key": KEY, "normalize": False, "dead_after": 20}
    apart = train(crosscoder(name), batches, **given)
    flat = train(crosscoder(name).dictionary, [x.reshape(B, -1) for x in batches], **given)
    for one, two in zip(jax.tree.leaves(apart.dictionary), jax.tree.leaves(flat.dictionary), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "law"])
    save(apart, tmp_path)
    np.testing.assert_array_equal(restore(tmp_path).dictionary(data()), apart.dictionary(data()))


def test_train_many__of_crosscoders__is_each_alone():
    some = [crosscoder(seed=seed) for seed in range(2)]
    given = {"steps": 4, "learning_rate": 1e-3, "steps_per_call": 2}
    for own in (False, True):
        batches = [data(i) for i in range(4)]
        stacks = [jnp.stack([x, data(20 + i)]) for i, x in enumerate(batches)] if own else batches
        many = train_many(some, stacks, own_batches=own, **given)
        alone = train(some[0], batches, key=KEY, **given)
        np.testing.assert_allclose(
            many[0].history["loss"], alone.history["loss"], **TOL["float32", "gradient"]
        )
        np.testing.assert_allclose(many[0].scale, alone.scale, **TOL["float32", "law"])
        np.testing.assert_allclose(
            many[0].dictionary(data()), alone.dictionary(data()), **TOL["float32", "gradient"]
        )


def test_train__of_a_crosscoder__begins_dead_latents_anew():
    given = {"steps": 6, "learning_rate": 1e-2, "key": KEY, "dead_after": 1}
    c = Crosscoder.init(
        n_sites=S, d_model=D, n_features=200, key=KEY, kind=ReLU, penalty="l1", coefficient=20.0
    )
    low = eqx.tree_at(lambda c: c.dictionary.b_enc, c, jnp.where(jnp.arange(200) < 100, -50.0, 0.0))
    out = train(low, [data(i) for i in range(6)], resample_at=[3], **given)
    assert (np.asarray(out.silent)[:100] <= 3 * B).all()


def test_crosscoder__of_what_does_not_fit__says_what_does():
    with pytest.raises(ArgumentError, match="n_sites=0, d_model=5: each size must be 1 or more"):
        Crosscoder.init(n_sites=0, d_model=D, n_features=F, key=KEY)
    with pytest.raises(ArgumentError, match="makes what it reads: leave `d_out` and `skip` out"):
        Crosscoder.init(n_sites=2, d_model=D, n_features=F, key=KEY, d_out=4)
    with pytest.raises(ArgumentError, match=r"kind=Switch.*a crosscoder can be made of ReLU, Gated"):
        Crosscoder.init(n_sites=2, d_model=D, n_features=F, key=KEY, kind=Switch, n_experts=2, k=1)
    with pytest.raises(ArgumentError, match="penalty='l1' has rows of length 1"):
        Crosscoder.init(n_sites=2, d_model=D, n_features=F, key=KEY, penalty="l1")
    with pytest.raises(ShapeError, match=r"shape \(4, 5\).*reads 3 sites of length 5: stack them"):
        crosscoder().encode(jnp.zeros((4, D)))
    with pytest.raises(ShapeError, match=r"batch of step 1 has shape \(18, 15\), and \(batch, 3, 5\)"):
        train(crosscoder(), [data().reshape(B, -1)], steps=1, learning_rate=1e-3, key=KEY)
