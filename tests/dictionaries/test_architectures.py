"""What single kinds are for, and what naive versions of them get wrong."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.dictionaries import BatchTopK, JumpReLU, Stage, TopK
from mechjax.dictionaries.jump_relu import SMALL, jump, step
from mechjax.dictionaries.largest import largest_of_all
from mechjax.dictionaries.products import Codes, pairs, read, write
from tests.dictionaries.kinds import B, D, F, drawn, stage, tokens
from tests.tolerances import TOL


def naive_largest(z, n):
    flat = np.maximum(np.asarray(z), 0).reshape(-1)
    order = np.argsort(-flat, kind="stable")[:n]
    found = np.zeros(len(flat), bool)
    found[order] = flat[order] > 0
    return found.reshape(z.shape)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_largest__with_ties__is_exactly_the_flattened_top_k(dtype):
    rng = np.random.default_rng(0)
    for n in (1, 7, 40, 300):
        z = jnp.asarray(rng.integers(-3, 4, (16, 30)) / 2, dtype)  # ties nearly everywhere
        found = largest_of_all(z, n)
        np.testing.assert_array_equal(found, naive_largest(z.astype(jnp.float32), n))
        assert int(found.sum()) == min(n, int((z > 0).sum()))
    z = jnp.asarray(rng.normal(size=(16, 30)), dtype)
    np.testing.assert_array_equal(largest_of_all(z, 48), naive_largest(z.astype(jnp.float32), 48))


@pytest.mark.parametrize("crossover", [0, 10_000], ids=["few", "all"])
def test_products__of_pairs__are_those_of_all(crossover, monkeypatch):
    monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": crossover})
    rng = np.random.default_rng(1)
    values = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32).at[2, 1].set(0.0)
    indices = jnp.asarray(rng.integers(0, 9, (6, 3))).at[4].set(5)  # one latent three times
    W, g = (
        jnp.asarray(rng.normal(size=(9, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(6, 4)), jnp.float32),
    )
    rows = np.arange(6)[:, None]

    def naive(values, W):
        return jnp.zeros((6, 9)).at[rows, indices].add(values) @ W

    made, back = jax.vjp(lambda v, W: write(Codes(v, indices), W), values, W)
    expected, other = jax.vjp(naive, values, W)
    np.testing.assert_allclose(made, expected, **TOL["float32", "law"])
    for one, two in zip(back(g), other(g), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "layout"])

    x, V, b = tokens(n=6, d=4), W.T, jnp.arange(9.0)
    z = x @ V + b
    found = Codes(jnp.take_along_axis(z, indices, -1), indices)
    at = jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    got, back = jax.vjp(lambda V, b: read(x, V, b, found), V, b)
    expected, other = jax.vjp(lambda V, b: jnp.take_along_axis(x @ V + b, indices, -1), V, b)
    np.testing.assert_allclose(got, expected, **TOL["float32", "layout"])
    for one, two in zip(back(at), other(at), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "layout"])


def test_pairs__of_what_is_kept__stand_in_the_first_columns():
    values = jnp.arange(12.0).reshape(4, 3) + 1
    kept = jnp.array([[1, 0, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]], bool)
    indices = jnp.tile(jnp.array([2, 0, 1]), (4, 1))
    found = pairs(values, indices, kept)
    assert int(found.columns) == 2  # five pairs, four a column
    active = found.holding(jnp.where(jnp.isfinite(found.values), found.values, 0))
    expected = np.zeros((4, 3))
    expected[np.nonzero(kept)[0], np.asarray(indices)[np.asarray(kept)]] = np.asarray(values)[
        np.asarray(kept)
    ]
    np.testing.assert_array_equal(active.dense(3), expected)
    assert np.isinf(found.values[:, 2]).all()


def of_part(dictionary, name, at, x):
    return eqx.filter_grad(lambda d: d.loss(x, x, at, d.select(x, at))[1].parts[name])(dictionary)


def test_aux_k__teaches_the_encoder_of_dead_latents_alone():
    """Where gradients at what the encoder gives are dropped, dead latents can never come back."""
    dead = np.arange(0, F, 2)
    grads = of_part(drawn("top_k"), "aux", stage(dead), tokens())
    columns = np.abs(np.asarray(grads.W_enc)).max(0)
    assert (columns[dead] > 0).sum() >= 6  # of k_aux = 6 a token, those that were chosen
    assert (np.delete(columns, dead) == 0).all()
    assert (np.abs(np.asarray(grads.W_dec)).max(-1)[np.setdiff1d(np.arange(F), dead)] == 0).all()


def test_aux_k__adds_no_decoder_bias_and_holds_the_error_fixed():
    dictionary = drawn("top_k", d_out=D)  # its input is not centred, so that b_dec is the decoder's alone
    grads = of_part(dictionary, "aux", stage(range(F // 2)), tokens())
    np.testing.assert_array_equal(grads.b_dec, np.zeros(D))


def test_aux_k__where_none_is_dead__is_nothing():
    assert float(drawn("top_k").loss(tokens(), tokens(), stage(), None)[1].parts["aux"]) == 0


def test_multi_top_k__teaches_the_encoder_beyond_k():
    dictionary, x = drawn("top_k, multi"), tokens()
    grads = of_part(dictionary, "multi", stage(), x)
    first = np.unique(np.asarray(jax.lax.top_k(dictionary.preactivations(x), 4)[1]))
    beyond = np.setdiff1d(np.arange(F), first)
    assert (np.abs(np.asarray(grads.W_enc)).max(0)[beyond] > 0).any()


def test_gated__the_gate_is_taught_by_a_decoder_that_stays():
    dictionary, x = drawn("gated", d_out=D), tokens()
    grads = of_part(dictionary, "gate", stage(), x)
    assert not np.any(grads.W_dec) and not np.any(grads.b_dec)
    assert np.abs(np.asarray(grads.W_enc)).max() > 0 and np.abs(np.asarray(grads.b_enc)).max() > 0
    error = eqx.filter_grad(lambda d: d.loss(x, x, stage(), None)[1].squared_error)(dictionary)
    assert not np.any(error.b_enc)  # a step has no derivative: gates learn from their own terms


def test_jump_relu__steps_have_the_derivative_of_their_mean():
    """Both halves of the window: the mean of H(z - t) over Gaussian z has the derivative -density(t)."""
    z, width = jax.random.normal(jax.random.key(0), (400_000,)), jnp.float32(0.2)
    density = lambda t: np.exp(-t * t / 2) / np.sqrt(2 * np.pi)
    for t in (0.0, 0.7, 1.5):
        counted = jax.grad(lambda t: step(z, t, width).mean())(jnp.float32(t))
        np.testing.assert_allclose(counted, -density(t), atol=5e-3)
        one_sided = (
            -((z > t) & (z < t + 0.1)).mean() / 0.2
        )  # a naive version, that looks at what passed alone
        assert abs(one_sided + density(t)) > 0.3 * density(t)
        moved = jax.grad(lambda t: jump(z, t, width, False).mean())(jnp.float32(t))
        np.testing.assert_allclose(moved, -t * density(t), atol=5e-3)
    at_z = jax.grad(lambda z: jump(z, jnp.float32(1.0), width, False).sum())(jnp.array([0.95, 1.05, 3.0]))
    np.testing.assert_array_equal(at_z, [0, 1, 1])
    flows = jax.grad(lambda z: jump(z, jnp.float32(1.0), width, True).sum())(jnp.array([0.95, 1.05, 3.0]))
    np.testing.assert_allclose(flows, [5, 6, 1], **TOL["float32", "layout"])


@pytest.mark.parametrize("penalty", ["step", "tanh"])
def test_jump_relu__a_window_wider_than_its_threshold__holds_no_latent_that_is_far_below(penalty):
    """Cut off at 0 first, all inactive latents would lie within it; and "tanh" could not pull them up."""
    given = JumpReLU.init(
        d_model=D, n_features=F, key=jax.random.key(0), penalty=penalty, threshold=0.1, bandwidth=1.0
    )
    low = eqx.tree_at(lambda d: d.b_enc, given, jnp.full(F, -50.0))
    grads = eqx.filter_grad(lambda d: d.loss(tokens(), tokens(), stage(), None)[0])(low)
    naive = jax.grad(lambda t: step(jnp.zeros(B), t, jnp.float32(1.0)).mean())(jnp.float32(0.1))
    assert abs(naive + 1) < 1e-5
    pulled = SMALL * np.asarray(low.decoder_norms()) if penalty == "tanh" else np.zeros(F)
    np.testing.assert_allclose(grads.threshold, pulled, **TOL["float32", "law"])
    np.testing.assert_allclose(grads.b_enc, -pulled, **TOL["float32", "law"])


def test_jump_relu__of_few_candidates__says_that_they_do_not_fit(monkeypatch):
    monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": 0})
    monkeypatch.setattr("mechjax.dictionaries.jump_relu.FEWEST", 2)
    dictionary = drawn("jump_relu")
    assert not bool(dictionary.select(tokens(), stage()).fits)


def test_batch_top_k__keeps_exactly_as_many_as_asked(monkeypatch):
    x = tokens()
    monkeypatch.setattr("mechjax.dictionaries.batch_top_k.SPARE", 20)
    for crossover in (0, 10_000):
        monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": crossover})
        dictionary = drawn("batch_top_k")
        _, outcome = dictionary.loss(x, x, stage(), dictionary.select(x, stage()))
        assert int(outcome.fired.sum()) == 2 * B
        kept = naive_largest(dictionary.preactivations(x), 2 * B)
        np.testing.assert_array_equal(outcome.fired, kept.sum(0))
        least = np.asarray(dictionary.preactivations(x))[kept].min()
        np.testing.assert_allclose(outcome.least, least, **TOL["float32", "law"])


def test_batch_top_k__a_token_with_more_than_was_looked_through__is_seen(monkeypatch):
    monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": 0})
    x = tokens().at[3].mul(100.0)  # one token takes them all
    dictionary = drawn("batch_top_k")
    assert not bool(dictionary.select(x, stage()).fits)


def test_batch_top_k__in_use__keeps_as_many_after_a_few_batches():
    """A threshold that begins at nothing, or moves from 0 at a fixed rate, keeps far too many."""
    dictionary = drawn("batch_top_k")
    for seed in range(5):
        x = tokens(seed)
        dictionary = dictionary.observed(dictionary.loss(x, x, stage(), dictionary.select(x, stage()))[1])
    active = (np.asarray(dictionary.encode(tokens(9, 400))) != 0).sum(-1).mean()
    assert abs(active - 2) < 0.3
    assert int(dictionary.n_observed) == 5 and dictionary.threshold.dtype == jnp.float32
    naive = 0.0
    for _ in range(5):
        naive += 0.01 * (float(dictionary.threshold) - naive)
    assert (np.asarray(dictionary.preactivations(tokens(9, 400))) > naive).sum(-1).mean() > 10


def test_batch_top_k__threshold__is_that_of_the_last_batches_not_of_all():
    """Kept latents change as a dictionary learns: the mean of a whole run of 300 batches would be 1.5 and keep more."""
    dictionary = drawn("batch_top_k")
    outcome = dictionary.loss(tokens(), tokens(), stage(), None)[1]
    least = jnp.linspace(1.0, 2.0, 300)
    step = lambda d, value: (d.observed(eqx.tree_at(lambda o: o.least, outcome, value)), None)
    arrays, static = eqx.partition(dictionary, eqx.is_array)
    again = lambda arrays, value: (
        eqx.partition(step(eqx.combine(arrays, static), value)[0], eqx.is_array)[0],
        None,
    )
    found = eqx.combine(jax.lax.scan(again, arrays, least)[0], static)
    weights = np.ones(1)
    for n in range(2, 301):
        new = 1 / min(n, 10) if n < 100 else 10 / n
        weights = np.append(weights * (1 - new), new)
    np.testing.assert_allclose(found.threshold, weights @ np.asarray(least), **TOL["float32", "parity"])
    assert 1.85 < float(found.threshold) < 2 and int(found.n_observed) == 300


def test_batch_top_k__of_nothing_positive__leaves_the_threshold():
    dictionary = BatchTopK.init(d_model=D, n_features=F, k=2, key=jax.random.key(0))
    low = eqx.tree_at(lambda d: d.b_enc, dictionary, jnp.full(F, -100.0))
    moved = low.observed(low.loss(tokens(), tokens(), stage(), None)[1])
    assert float(moved.threshold) == 0 and int(moved.n_observed) == 0


def test_matryoshka__prefixes__equal_slices_that_are_decoded():
    dictionary, x = drawn("matryoshka"), tokens()
    at = stage()
    value, outcome = dictionary.loss(x, x, at, dictionary.select(x, at))
    z = np.asarray(dictionary.preactivations(x))
    f = np.where(naive_largest(z, 2 * B), z, 0)
    errors = []
    for m in (5, 30, F):
        made = f[:, :m] @ np.asarray(dictionary.W_dec)[:m] + np.asarray(dictionary.b_dec)
        errors.append(np.square(np.asarray(x) - made).sum(-1).mean() / float(outcome.variance))
    np.testing.assert_allclose(value, np.mean(errors), **TOL["float32", "layout"])
    np.testing.assert_allclose(outcome.fvu, errors[-1], **TOL["float32", "layout"])


def test_fvu__of_data_far_from_zero__equals_float64():
    x = tokens(n=200) + 10.0
    dictionary = TopK.init(d_model=D, n_features=F, k=4, key=jax.random.key(0))
    dictionary = eqx.tree_at(lambda d: d.b_dec, dictionary, x.mean(0))
    outcome = dictionary.loss(x, x, stage(), None)[1]
    wide = np.asarray(x, np.float64)
    made = np.asarray(dictionary(x), np.float64)
    expected = np.square(wide - made).sum() / np.square(wide - wide.mean(0)).sum()
    np.testing.assert_allclose(outcome.fvu, expected, **TOL["float32", "gradient"])


def test_loss__of_constant_activations__is_finite():
    x = jnp.ones((B, D))
    for name in ("top_k", "batch_top_k", "matryoshka", "relu"):
        dictionary, at = drawn(name), Stage.late(F)
        value, _ = dictionary.loss(x, x, at, dictionary.select(x, at))
        grads = eqx.filter_grad(lambda d, at=at: d.loss(x, x, at, d.select(x, at))[0])(dictionary)
        assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
