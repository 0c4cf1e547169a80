"""The stream of activations: whose rows they are, that each comes once, and in no order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.dictionaries import TopK
from mechjax.dictlearn import activations, shuffled, train
from tests.compilations import nothing_compiles

KEY = jax.random.key(0)


def numbered(n, at_a_time):
    rows = jnp.arange(float(n))[:, None]
    return [rows[i : i + at_a_time] for i in range(0, n, at_a_time)]


@pytest.mark.parametrize(
    ("n", "at_a_time", "buffer"), [(960, 50, 200), (960, 400, 200), (90, 7, 200), (0, 1, 200)]
)
def test_shuffled__gives_each_row_once(n, at_a_time, buffer):
    found = list(shuffled(numbered(n, at_a_time), 20, buffer, KEY))
    assert all(batch.shape == (20, 1) for batch in found)
    rows = np.concatenate(found)[:, 0].astype(int) if found else np.zeros(0, int)
    assert len(set(rows)) == len(rows) == n // 20 * 20
    if n == 960:
        assert sorted(rows) == list(range(n))


def test_shuffled__leaves_no_order():
    """Neighbours lie apart, and a row comes from anywhere in the buffer: chi-squared over eighths of it."""
    rows = np.concatenate(list(shuffled(numbered(40_000, 100), 100, 8000, KEY)))[:, 0]
    assert abs(np.corrcoef(rows[:4000][:-1], rows[:4000][1:])[0, 1]) < 0.05
    first = np.bincount((rows[:4000] // 1000).astype(int), minlength=8)  # of the first 8,000 rows, half
    assert np.square(first - 500).sum() / 500 < 18.5  # 7 degrees of freedom, p = 0.01
    again = np.concatenate(list(shuffled(numbered(40_000, 100), 100, 8000, KEY)))[:, 0]
    np.testing.assert_array_equal(rows, again)
    other = np.concatenate(list(shuffled(numbered(40_000, 100), 100, 8000, jax.random.key(1))))[:, 0]
    assert (rows != other).mean() > 0.9


def prompts(model, n=6):
    keys = jax.random.split(jax.random.key(3), n)
    return [jax.random.randint(key, (4, 6), 0, model.config.d_vocab) for key in keys]


@pytest.mark.parametrize("site", ["resid_post", "z"])
def test_activations__are_those_of_the_site(tiny_model, site):
    texts = prompts(tiny_model)
    found = np.concatenate(list(activations(tiny_model, texts, site, layer=1, batch=12, buffer=48, key=KEY)))
    expected = [mj.capture(tiny_model, [site])(ids)[1][site][1].reshape(24, -1) for ids in texts]
    expected = np.concatenate(expected)
    assert found.shape == expected.shape == (144, 16)
    order = lambda rows: rows[np.lexsort(np.round(rows, 4).T)]
    np.testing.assert_allclose(order(found), order(expected), rtol=1e-5, atol=1e-5)


def test_activations__of_padded_texts__leave_padding_and_first_tokens_out(tiny_model):
    mask = jnp.ones((4, 6), bool).at[0, 4:].set(False).at[1, :3].set(False)
    texts = [mj.Prompts(ids, mask) for ids in prompts(tiny_model, 2)]
    get = lambda **o: list(
        activations(tiny_model, texts, "resid_pre", layer=0, batch=1, buffer=8, key=KEY, **o)
    )
    assert len(get()) == 2 * (24 - 2 - 3)
    assert len(get(skip_first=True)) == 2 * (24 - 2 - 3 - 4)
    starts = np.concatenate([mj.capture(tiny_model, ["resid_pre"])(p)[1]["resid_pre"][0] for p in texts])
    first = np.asarray(starts)[[0, 1, 2, 3], [0, 3, 0, 0]]
    rows = np.concatenate(get(skip_first=True))
    assert min(np.abs(rows - row).max(-1).min() for row in first) > 1e-3


def test_activations__of_texts_of_any_lengths__compile_nothing_anew(tiny_model, caplog):
    """As many real tokens as there may be: a program for each number of them would be one for nearly every batch."""
    rng = np.random.default_rng(0)
    masks = [np.arange(6) < rng.integers(1, 7, (4, 1)) for _ in range(40)]
    texts = [mj.Prompts(ids, jnp.asarray(m)) for ids, m in zip(prompts(tiny_model, 40), masks, strict=True)]
    assert len({int(m.sum()) for m in masks}) > 8
    stream = activations(tiny_model, texts, "resid_post", layer=1, batch=8, buffer=64, key=KEY)
    first = [next(stream) for _ in range(9)]  # through two refills
    with nothing_compiles(caplog):
        rest = list(stream)
    rows = np.concatenate([*first, *rest])
    n = sum(int(m.sum()) for m in masks)
    assert len(rows) == n // 8 * 8
    real = np.concatenate(
        [mj.capture(tiny_model, ["resid_post"])(p)[1]["resid_post"][1][p.mask] for p in texts]
    )
    assert np.abs(rows[:, None] - real).max(-1).min(1).max() < 1e-5


def test_activations__train_a_dictionary(tiny_model):
    stream = activations(
        tiny_model, prompts(tiny_model, 40), "resid_post", layer=2, batch=24, buffer=96, key=KEY
    )
    dictionary = TopK.init(d_model=16, n_features=48, k=6, key=KEY)
    out = train(dictionary, stream, steps=40, learning_rate=1e-2, key=KEY)
    assert out.history["fvu"][-1] < 0.6 * out.history["fvu"][0]


def test_activations__of_what_cannot_be__say_what_can(tiny_model):
    with pytest.raises(ArgumentError, match="batch=8, buffer=12: the buffer holds at least two batches"):
        activations(tiny_model, [], "resid_post", layer=0, batch=8, buffer=12, key=KEY)
    with pytest.raises(SiteError, match="no site is named `residual`"):
        next(activations(tiny_model, prompts(tiny_model), "residual", layer=0, batch=8, key=KEY))
