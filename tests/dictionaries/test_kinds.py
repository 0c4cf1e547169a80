"""What holds for every kind of dictionary."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.records import restore, save
from mechjax.dictionaries import BatchTopK, JumpReLU, Matryoshka, ReLU, TopK
from mechjax.dictionaries.products import Codes
from tests.dictionaries.kinds import KINDS, B, D, F, drawn, stage, tokens
from tests.tolerances import TOL

each = pytest.mark.parametrize("name", KINDS)


def some(*names):
    """These kinds; all others by hand."""
    marked = [name if name in names else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
    return pytest.mark.parametrize("name", marked)


@each
def test_dictionary__of_any_batch__encodes_tokens_one_by_one(name):
    dictionary, x = drawn(name), tokens()
    f = dictionary.encode(x)
    assert f.shape == (B, F) and dictionary.n_features == F and dictionary.d_model == D
    assert (f >= 0).all() and (f > 0).any()
    np.testing.assert_allclose(
        dictionary.encode(x.reshape(2, 3, -1, D)).reshape(B, F), f, **TOL["float32", "law"]
    )
    np.testing.assert_allclose(dictionary.encode(x[5]), f[5], **TOL["float32", "law"])
    expected = np.asarray(f) @ np.asarray(dictionary.W_dec) + np.asarray(dictionary.b_dec)
    np.testing.assert_allclose(dictionary(x), expected, **TOL["float32", "layout"])


@each
@pytest.mark.parametrize(
    "shape", [{}, {"d_out": 7}, {"d_out": D, "skip": True}], ids=["sae", "transcoder", "skip"]
)
def test_dictionary__in_other_units__is_the_same(name, shape):
    dictionary, x = drawn(name, **shape), tokens()
    written = 2.5 if dictionary.centred else 0.4
    larger = dictionary.scaled(2.5, written)
    np.testing.assert_allclose(larger(2.5 * x), written * dictionary(x), **TOL["float32", "layout"])
    np.testing.assert_allclose(
        larger.encode(2.5 * x), written * dictionary.encode(x), **TOL["float32", "layout"]
    )
    back = larger.scaled(1 / 2.5, 1 / written)
    for one, two in zip(jax.tree.leaves(back), jax.tree.leaves(dictionary), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "law"])


@each
def test_loss__is_the_error_of_what_is_made_and_its_parts(name):
    dictionary, x = drawn(name), tokens()
    y = x if dictionary.centred else tokens(1)
    value, outcome = dictionary.loss(x, y, stage(), dictionary.select(x, stage()))
    assert value.shape == () and np.isfinite(value)
    assert int(outcome.fired.sum()) == round(float(outcome.l0) * B)
    spread = np.square(np.asarray(y) - np.asarray(y).mean(0)).sum(-1).mean()
    np.testing.assert_allclose(outcome.variance, spread, **TOL["float32", "layout"])
    if name in ("relu", "jump_relu", "top_k"):
        made = np.asarray(dictionary(x))
        np.testing.assert_allclose(
            outcome.squared_error, np.square(np.asarray(y) - made).sum(-1).mean(), **TOL["float32", "layout"]
        )
        assert int(outcome.fired.sum()) == (np.asarray(dictionary.encode(x)) != 0).sum()


@some("top_k")
def test_loss__through_few_latents__has_the_gradients_of_all(name, monkeypatch):
    dictionary, x = drawn(name), tokens()
    at = stage(range(0, F, 3))

    def grads(dictionary):
        selected = dictionary.select(x, at)
        found = eqx.filter_value_and_grad(lambda d: d.loss(x, x, at, selected), has_aux=True)(dictionary)
        return selected, found

    monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": 0})
    monkeypatch.setattr("mechjax.dictionaries.jump_relu.FEWEST", F)
    monkeypatch.setattr("mechjax.dictionaries.batch_top_k.SPARE", 20)
    few, ((value, outcome), sparse) = grads(dictionary)
    monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": F})
    _, ((expected, other), dense) = grads(dictionary)
    if name.startswith(("batch", "matr", "jump")) and "tanh" not in name:
        assert few is not None and few.codes.tokens is not None and bool(few.fits)
        assert int(few.codes.columns) < few.codes.values.shape[1]
    np.testing.assert_allclose(value, expected, **TOL["float32", "law"])
    np.testing.assert_array_equal(outcome.fired, other.fired)
    for one, two in zip(jax.tree.leaves(sparse), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "gradient"])


@some("top_k", "jump_relu")
def test_gradients__equal_finite_differences_but_for_steps(name):
    """Of what is differentiable where it stands: decoder and bias."""
    with jax.enable_x64(True):
        dictionary = drawn(name, dtype=jnp.float64)
        x, at = jnp.asarray(np.asarray(tokens()), jnp.float64), stage()
        at = jax.tree.map(lambda z: z.astype(jnp.float64) if z.dtype == jnp.float32 else z, at)
        loss = lambda d: d.loss(x, x, at, d.select(x, at))[0]
        grad = eqx.filter_grad(loss)(dictionary)
        for of in ("W_dec", "b_dec") if "gated" not in name else ("b_size",):
            along = jax.random.normal(jax.random.key(3), getattr(dictionary, of).shape, jnp.float64)
            moved = lambda h, of=of, along=along: eqx.tree_at(
                lambda d: getattr(d, of), dictionary, getattr(dictionary, of) + h * along
            )
            slope = (loss(moved(1e-6)) - loss(moved(-1e-6))) / 2e-6
            np.testing.assert_allclose((getattr(grad, of) * along).sum(), slope, rtol=1e-6)


@each
def test_constrained__has_rows_of_length_one_where_the_kind_has(name):
    dictionary = drawn(name)
    longer = eqx.tree_at(lambda d: d.W_dec, dictionary, 3 * dictionary.W_dec)
    lengths = np.asarray(longer.constrained().decoder_norms())
    expected = np.ones(F) if dictionary.unit_norm else np.asarray(longer.decoder_norms())
    np.testing.assert_allclose(lengths, expected, **TOL["float32", "law"])
    assert dictionary.unit_norm == (name not in ("relu", "jump_relu, tanh"))


@each
def test_dictionary__saved_and_restored__is_the_same(name, tmp_path):
    dictionary = drawn(name)
    save(dictionary, tmp_path)
    found = restore(tmp_path)
    assert type(found) is type(dictionary)
    np.testing.assert_array_equal(found(tokens()), dictionary(tokens()))


@each
def test_dictionary__of_another_width__says_which(name):
    with pytest.raises(ShapeError, match=r"shape \(4, 11\).*reads vectors of length 12"):
        drawn(name).encode(jnp.zeros((4, 11)))


@each
def test_dictionaries__stacked__map(name):
    some = [drawn(name, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *x: jnp.stack(x), *some)
    found = eqx.filter_vmap(lambda d: d.encode(tokens()))(stack)
    for one, own in zip(found, some, strict=True):
        np.testing.assert_allclose(one, own.encode(tokens()), **TOL["float32", "law"])


def test_init__of_sizes_that_cannot_be__says_what_can():
    key = jax.random.key(0)
    with pytest.raises(ArgumentError, match=r"n_features=0.*each size must be 1 or more"):
        ReLU.init(d_model=4, n_features=0, key=key)
    with pytest.raises(ArgumentError, match="k=9 of n_features=8"):
        TopK.init(d_model=4, n_features=8, k=9, key=key)
    with pytest.raises(ArgumentError, match="k=9 of n_features=8"):
        BatchTopK.init(d_model=4, n_features=8, k=9, key=key)
    with pytest.raises(ArgumentError, match=r"prefixes=\(4, 2, 8\).*lengths that rise"):
        Matryoshka.init(d_model=4, n_features=8, k=2, prefixes=(4, 2, 8), key=key)
    with pytest.raises(ArgumentError, match=r"bandwidth=-1.*must be positive"):
        JumpReLU.init(d_model=4, n_features=8, bandwidth=-1.0, key=key)


def test_init__of_an_unknown_penalty__names_those_that_are(as_a_user):
    with pytest.raises(ArgumentError, match=r"penalty='l0'.*'step', 'quadratic' or 'tanh'"):
        JumpReLU.init(d_model=4, n_features=8, penalty="l0", key=jax.random.key(0))


def test_codes__dense__adds_pairs_of_one_place():
    codes = Codes(jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.array([[0, 0], [2, 1]]))
    np.testing.assert_array_equal(codes.dense(3), [[3, 0, 0], [0, 0, 3]])
    np.testing.assert_array_equal(codes.fired(3), [2, 0, 1])
