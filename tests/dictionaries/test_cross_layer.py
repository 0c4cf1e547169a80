"""Transcoders across layers, against loops in numpy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.records import restore, save
from mechjax.dictionaries import CrossLayerTranscoder, Stage
from mechjax.dictlearn import train, train_many
from tests.tolerances import TOL

L, D, F, OUT, B = 3, 6, 10, 5, 16
KEY = jax.random.key(0)


def transcoder(seed=0, **options):
    """One whose arrays are all drawn."""
    fresh = CrossLayerTranscoder.init(
        n_layers=L, d_model=D, n_features=F, d_out=OUT, key=jax.random.key(seed), threshold=0.2, **options
    )
    moved = {"b_enc", "b_dec", "W_skip", "W_dec"}
    keys = iter(jax.random.split(jax.random.key(seed + 1), 9))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (
            x + 0.3 * jax.random.normal(next(keys), x.shape, x.dtype) if path[-1].name in moved else x
        ),
        fresh,
    )


def data(seed=0, d=D):
    return jax.random.normal(jax.random.key(50 + seed), (B, L, d)) + 0.2


def by_loops(t, x):
    """Latents and what they make, token by token and pair by pair of layers."""
    x, wide = np.asarray(x, np.float64), jax.tree.map(lambda a: np.asarray(a, np.float64), t)
    f, made = np.zeros((len(x), L, F)), np.zeros((len(x), L, OUT))
    for b in range(len(x)):
        for i in range(L):
            z = x[b, i] @ wide.W_enc[i] + wide.b_enc[i]
            f[b, i] = np.where(z > wide.threshold[i], z, 0)
        for l in range(L):
            made[b, l] = wide.b_dec[l] + (0 if t.W_skip is None else x[b, l] @ wide.W_skip[l])
            for i in range(l + 1):
                made[b, l] += f[b, i] @ np.asarray(t.decoder(i, l), np.float64)
    return f, made


def test_loss__through_few_latents__has_the_gradients_of_all(monkeypatch):
    t, x = transcoder(skip=True, bandwidth=0.3), data()
    t = eqx.tree_at(lambda t: t.threshold, t, jnp.linspace(0.3, 1.2, L * F).reshape(L, F))
    y, stage = data(1, OUT), Stage.late(F)
    loss = eqx.filter_value_and_grad(lambda t, chosen: t.loss(x, y, stage, chosen), has_aux=True)
    assert t.select(x, stage) is None  # ten latents are too few to spare any
    (expected, other), dense = loss(t, None)
    monkeypatch.setattr("mechjax.dictionaries.products.CROSSOVER", {"cpu": 0})
    monkeypatch.setattr("mechjax.dictionaries.cross_layer.FEWEST", F)
    chosen = t.select(x, stage)
    assert bool(chosen.fits) and chosen.codes.indices.shape == (L, B, F)
    assert (chosen.codes.columns < F).all() and (chosen.codes.columns > 0).all()
    (value, outcome), sparse = eqx.filter_jit(loss)(t, chosen)
    np.testing.assert_allclose(value, expected, **TOL["float32", "law"])
    np.testing.assert_array_equal(outcome.fired, other.fired)
    assert 0 < outcome.fired.sum() < B * L * F // 2
    np.testing.assert_allclose(outcome.l0, other.l0, **TOL["float32", "law"])
    for one, two in zip(jax.tree.leaves(sparse), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "gradient"])
    monkeypatch.setattr("mechjax.dictionaries.cross_layer.FEWEST", 2)
    assert not bool(t.select(x, stage).fits)


@pytest.mark.parametrize("skip", [False, True])
def test_cross_layer__equals_loops_over_layers(skip):
    t, x = transcoder(skip=skip), data()
    f, made = by_loops(t, x)
    np.testing.assert_allclose(t.encode(x), f, **TOL["float32", "layout"])
    np.testing.assert_allclose(t(x), made, **TOL["float32", "layout"])
    np.testing.assert_allclose(t(x[3]), made[3], **TOL["float32", "layout"])
    assert (t.n_layers, t.n_features, t.d_model, t.reads, t.writes) == (L, F, D, (L, D), (L, OUT))


def test_cross_layer__latents_write_to_no_layer_before_their_own():
    t, x = transcoder(), data()
    for i in range(L):
        moved = t.decode(t.encode(x).at[:, i].add(1.0)) - t.decode(t.encode(x))
        changed = np.abs(np.asarray(moved)).max((0, 2)) > 0
        assert changed.tolist() == [l >= i for l in range(L)]


def test_loss__is_the_error_of_all_layers_and_the_penalty_of_a_mean_token():
    t, x, y = transcoder(coefficient=0.7), data(), data(1, OUT)
    value, outcome = t.loss(x, y, Stage.late(F), None)
    f, made = by_loops(t, x)
    error = np.square(np.asarray(y) - made).sum((1, 2)).mean()
    norms = [
        np.sqrt(sum(np.square(np.asarray(t.decoder(i, l))).sum(-1) for l in range(i, L))) for i in range(L)
    ]
    np.testing.assert_allclose(t.decoder_norms(), norms, **TOL["float32", "layout"])
    penalty = 0.7 * np.tanh(4 * f * np.array(norms)).sum((1, 2)).mean()
    np.testing.assert_allclose(outcome.squared_error, error, **TOL["float32", "layout"])
    np.testing.assert_allclose(value, error + penalty, **TOL["float32", "layout"])
    np.testing.assert_array_equal(outcome.fired, (f > 0).sum(0))
    np.testing.assert_allclose(outcome.l0, (f > 0).sum((1, 2)).mean(), **TOL["float32", "law"])
    twice, _ = t.loss(jnp.concatenate([x, x]), jnp.concatenate([y, y]), Stage.late(F), None)
    np.testing.assert_allclose(twice, value, **TOL["float32", "layout"])  # a mean, whatever the batch's size


def test_gradients__equal_finite_differences_and_reach_thresholds_by_the_window():
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), tree)
        t, x, y = wide(transcoder()), wide(data()), wide(data(1, OUT))
        at = Stage(jnp.zeros((L, F), bool), jnp.ones(()), jnp.ones(()))
        loss = lambda t: t.loss(x, y, at, None)[0]
        grad = eqx.filter_grad(loss)(t)
        for of in ("W_dec", "b_dec"):
            along = jax.random.normal(KEY, getattr(t, of).shape, jnp.float64)
            moved = lambda h, of=of, along=along: eqx.tree_at(
                lambda d: getattr(d, of), t, getattr(t, of) + h * along
            )
            slope = (loss(moved(1e-6)) - loss(moved(-1e-6))) / 2e-6
            np.testing.assert_allclose((getattr(grad, of) * along).sum(), slope, rtol=1e-6)
    inside = (np.abs(np.maximum(by_preactivations(t, x), 0) - 0.2) < 0.5).any(0)
    np.testing.assert_array_equal(np.asarray(grad.threshold) != 0, inside)


def by_preactivations(t, x):
    return np.einsum("bld,ldf->blf", np.asarray(x), np.asarray(t.W_enc)) + np.asarray(t.b_enc)


def test_gradients__of_rows_of_zeros__are_finite():
    t = eqx.tree_at(lambda d: d.W_dec, transcoder(), replace_fn=jnp.zeros_like)
    grad = eqx.filter_grad(lambda t: t.loss(data(), data(1, OUT), Stage.late(F), None)[0])(t)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


def test_cross_layer__in_other_units__is_the_same():
    t, x = transcoder(skip=True), data()
    r, w = jnp.array([2.0, 0.5, 3.0]), jnp.array([0.25, 4.0, 1.5])
    larger = t.scaled(r, w)
    np.testing.assert_allclose(larger(r[:, None] * x), w[:, None] * t(x), **TOL["float32", "layout"])
    np.testing.assert_allclose(
        larger.encode(r[:, None] * x), w.mean() * t.encode(x), **TOL["float32", "layout"]
    )
    np.testing.assert_allclose(t.scaled(2.0, 4.0)(2 * x), 4 * t(x), **TOL["float32", "layout"])


def test_cross_layer__saved_and_restored__is_the_same(tmp_path):
    save(transcoder(), tmp_path)
    np.testing.assert_array_equal(restore(tmp_path)(data()), transcoder()(data()))


def world(n, sizes=(1.0, 1.0)):
    """Two layers: features of the first are written to both layers, those of the second to its own."""
    features = jnp.stack(
        [jnp.linalg.qr(jax.random.normal(key, (12, 12)))[0] for key in jax.random.split(KEY)]
    )
    to = jax.random.normal(jax.random.key(5), (3, 12, 8))  # 0 to 0, 0 to 1, 1 to 1

    def draw(key):
        there, size = jax.random.split(key)
        a = jnp.where(
            jax.random.uniform(there, (256, 2, 12)) < 0.1, 1 + jax.random.uniform(size, (256, 2, 12)), 0
        )
        x = jnp.einsum("blf,lfd->bld", a, features)
        y = jnp.stack([a[:, 0] @ to[0], a[:, 0] @ to[1] + a[:, 1] @ to[2]], 1)
        return jnp.array(sizes)[:, None] * x, 3 * y + 1

    return features, to, [draw(key) for key in jax.random.split(jax.random.key(9), n)]


@pytest.mark.slow
def test_train__of_a_transcoder_across_layers__finds_what_each_layer_writes_where():
    features, to, pairs = world(600, sizes=(1.0, 20.0))
    t = CrossLayerTranscoder.init(n_layers=2, d_model=12, n_features=16, d_out=8, key=KEY, coefficient=0.8)
    out = train(t, pairs, steps=600, learning_rate=1e-2, key=KEY, steps_per_call=50)
    assert out.scale.shape == (2, 2) and out.silent.shape == (2, 16)
    assert out.history["fvu"][0] > 0.8 and out.history["fvu"][-1] < 0.1
    x, y = pairs[0]
    error = jnp.square(out.dictionary(x) - y).sum() / jnp.square(y - y.mean(0)).sum()
    assert error < 0.1  # in the data's own units
    unit = lambda z, axis=-1: z / jnp.linalg.norm(z, axis=axis, keepdims=True)
    for pair, (i, l) in enumerate([(0, 0), (0, 1), (1, 1)]):
        cosines = unit(to[pair]) @ unit(out.dictionary.decoder(i, l)).T
        reading = features[i] @ unit(out.dictionary.W_enc[i], 0)
        best = reading.argmax(-1)
        found = jnp.take_along_axis(cosines, best[:, None], -1)[:, 0]
        assert float(found.mean()) > 0.85, (pair, found)  # what reads a feature writes what it does


def test_train_many__of_transcoders_across_layers__is_each_alone():
    pairs = [(data(i), data(10 + i, OUT)) for i in range(4)]
    some = [transcoder(seed) for seed in range(2)]
    given = {"steps": 4, "learning_rate": 1e-3, "steps_per_call": 2}
    many, alone = train_many(some, pairs, **given), train(some[1], pairs, key=KEY, **given)
    np.testing.assert_allclose(many[1].history["loss"], alone.history["loss"], **TOL["float32", "gradient"])


def test_cross_layer__of_what_does_not_fit__says_what_does():
    with pytest.raises(ArgumentError, match=r"n_layers=0.*each must be positive"):
        CrossLayerTranscoder.init(n_layers=0, d_model=D, n_features=F, key=KEY)
    with pytest.raises(ShapeError, match=r"shape \(4, 6\).*reads 3 layers of length 6: stack them"):
        transcoder().encode(jnp.zeros((4, D)))
    with pytest.raises(ArgumentError, match="no decoder from layer 2 to 1"):
        transcoder().decoder(2, 1)
    with pytest.raises(
        ShapeError, match=r"batch of step 1 has shape \(16, 6\), and \(batch, 3, 6\) is what is read"
    ):
        train(transcoder(), [(data()[:, 0], data(1, OUT))], steps=1, learning_rate=1e-3, key=KEY)
    with pytest.raises(ArgumentError, match="dead latents of a CrossLayerTranscoder cannot be begun anew"):
        train(transcoder(), [], steps=3, resample_at=[1], learning_rate=1e-3, key=KEY)
