"""Switch dictionaries, against one token at a time in numpy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries import Switch
from mechjax.dictionaries.switch import of_experts
from mechjax.dictlearn import train
from tests.dictionaries.kinds import B, F, drawn, stage, tokens
from tests.dictlearn.test_worlds import found, world
from tests.tolerances import TOL

KEY = jax.random.key(0)


def by_tokens(d, x):
    """Latents and the router's probabilities, one token at a time."""
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), d)
    n, f = F // d.n_experts, np.zeros((len(x), F))
    seen = np.asarray(x, np.float64) - (wide.b_dec if d.centred else 0)
    logits = seen @ wide.W_router + wide.b_router
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for t in range(len(x)):
        e = int(p[t].argmax())
        z = seen[t] @ wide.W_enc[:, e * n : (e + 1) * n] + wide.b_enc[e * n : (e + 1) * n]
        for i in np.argsort(-z)[: d.k]:
            f[t, e * n + i] = p[t, e] * max(z[i], 0)
    return f, p


@pytest.mark.parametrize("shape", [{}, {"d_out": 7}], ids=["sae", "transcoder"])
def test_switch__equals_one_token_at_a_time(shape):
    d, x = drawn("switch", **shape), tokens()
    f, p = by_tokens(d, x)
    np.testing.assert_allclose(d.encode(x), f, **TOL["float32", "layout"])
    np.testing.assert_allclose(d.routed(x), p, **TOL["float32", "layout"])
    y = tokens(1, d=d.writes[0]) if shape else x
    value, outcome = d.loss(x, y, stage(), d.select(x, stage()))
    made = f @ np.asarray(d.W_dec) + np.asarray(d.b_dec)
    fvu = np.square(np.asarray(y) - made).sum() / np.square(np.asarray(y) - np.asarray(y).mean(0)).sum()
    share = np.bincount(p.argmax(-1), minlength=4) / B
    uneven = 3 * 4 * (share * p.mean(0)).sum()
    np.testing.assert_allclose(outcome.parts["balance"], uneven, **TOL["float32", "layout"])
    np.testing.assert_allclose(value, fvu + uneven, **TOL["float32", "layout"])
    np.testing.assert_array_equal(outcome.fired, (f > 0).sum(0))


def test_of_experts__sorted__equals_all_of_them(monkeypatch):
    x, W = tokens(), jax.random.normal(KEY, (4, 12, 5))
    for expert in (jax.random.randint(KEY, (B,), 0, 4), jnp.full(B, 2)):  # three experts with nothing, too
        expected = np.stack([np.asarray(x[t]) @ np.asarray(W[int(e)]) for t, e in enumerate(expert)])
        every = of_experts(x, W, expert)
        with monkeypatch.context() as patch:
            patch.setattr("mechjax.dictionaries.switch.SORTED", ("cpu", "gpu"))
            np.testing.assert_allclose(of_experts(x, W, expert), expected, **TOL["float32", "layout"])
        np.testing.assert_allclose(every, expected, **TOL["float32", "layout"])


@pytest.mark.parametrize("shape", [{}, {"d_out": 7}], ids=["sae", "transcoder"])
def test_switch__sorted_and_stacked__encodes_as_each_alone(shape, monkeypatch):
    monkeypatch.setattr("mechjax.dictionaries.switch.SORTED", ("cpu",))
    some = [drawn("switch", seed, **shape) for seed in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *some)
    every = eqx.filter_vmap(lambda d: d.encode(tokens()))(stack)
    for one, own in zip(every, some, strict=True):
        np.testing.assert_allclose(one, by_tokens(own, tokens())[0], **TOL["float32", "layout"])
    grad = jax.grad(lambda x: some[0].encode(x).sum())(tokens())
    monkeypatch.setattr("mechjax.dictionaries.switch.SORTED", ())
    expected = jax.grad(lambda x: some[0].encode(x).sum())(tokens())
    np.testing.assert_allclose(grad, expected, **TOL["float32", "gradient"])


def test_gradients__reach_the_router_by_what_is_made_and_by_the_balance():
    d, x = drawn("switch"), tokens()
    grad = lambda of: eqx.filter_grad(lambda d: of(d.loss(x, x, stage(), None)[1]))(d).W_router
    assert np.abs(np.asarray(grad(lambda o: o.squared_error))).max() > 1e-4
    assert np.abs(np.asarray(grad(lambda o: o.parts["balance"]))).max() > 1e-4


@pytest.mark.slow
def test_train__of_a_switch__finds_features_and_uses_all_experts():
    features, draw = world(0)
    batches = [draw(key) for key in jax.random.split(KEY, 1000)]
    d = Switch.init(d_model=64, n_features=512, n_experts=4, k=4, key=jax.random.key(7))
    out = train(d, batches, steps=1000, learning_rate=3e-3, key=KEY, steps_per_call=100)
    x = jnp.concatenate(batches[:10])
    matched, explained, l0 = found(out.dictionary, features, x)
    used = np.bincount(np.asarray(out.dictionary.routed(x).argmax(-1)), minlength=4) / len(x)
    assert out.history["fvu"][-1] < 0.5 * out.history["fvu"][0]
    assert matched > 0.8 and explained > 0.6 and l0 <= 4, (matched, explained, l0)
    assert used.min() > 0.1, used


def test_init__of_experts_that_cannot_share__says_what_can():
    with pytest.raises(ArgumentError, match="n_experts=3 of n_features=8: experts have equally many"):
        Switch.init(d_model=4, n_features=8, n_experts=3, k=1, key=KEY)
    with pytest.raises(ArgumentError, match="k=3 of n_features=2"):
        Switch.init(d_model=4, n_features=8, n_experts=4, k=3, key=KEY)
