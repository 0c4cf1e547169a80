"""Targeted probe perturbation and removal of spurious correlations: against loops over edited rows, and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.dicteval import spurious_correlation_removal, targeted_probe_perturbation
from mechjax.dictionaries import Normalized, ReLU
from tests.compilations import nothing_compiles
from tests.dicteval.by_hand import balanced, probe
from tests.dictionaries.kinds import D, drawn
from tests.fit.by_scipy import by_scipy
from tests.tolerances import TOL

CLOSE = TOL["float32", "gradient"]
ROWS, N = 240, (1, 2, 5, 20)


def coordinates(both=False):
    """A perfect dictionary of features that are the coordinates: 0 or more, or of both signs."""
    rows = jnp.concatenate([jnp.eye(D), -jnp.eye(D)]) if both else jnp.eye(D)
    return ReLU(rows.T, jnp.zeros(len(rows)), rows, jnp.zeros(D), coefficient=jnp.zeros(()))


@pytest.fixture(scope="module")
def data():
    """Three labels, uneven; two attributes; rows that overlap; what is held out."""
    rng = np.random.default_rng(0)
    labels, a, b = rng.choice(3, ROWS, p=[0.5, 0.3, 0.2]), rng.random(ROWS) < 0.6, rng.random(ROWS) < 0.4
    x = rng.normal(size=(ROWS, D)) + 1.5 * rng.normal(size=(3, D))[labels]
    x += np.outer(2 * a - 1, rng.normal(size=D) / 3) + np.outer(2 * b - 1, rng.normal(size=D) / 2)
    return x.astype(np.float32), labels, a, b, rng.random(ROWS) < 0.3


def edited(dictionary, x, latents):
    """Rows with latents set to 0, what the dictionary misses kept."""
    f = dictionary.encode(x)
    zero = f.at[:, jnp.asarray(latents, int)].set(0.0)
    made = lambda f: dictionary.completed(dictionary.decode(f), x)
    return np.asarray(x + made(zero) - made(f), np.float64)


def right(x, probes, j, y, weights):
    """Accuracy of one probe."""
    margins = x @ np.asarray(probes.weight[j], np.float64) + float(probes.bias[j])
    return (weights * ((margins > 0) == y)).sum() / weights.sum()


@pytest.mark.parametrize("kind", ["top_k", "normalized"])
def test_targeted_probe_perturbation__equals_a_loop_over_edited_rows(data, kind):
    x, labels, _, _, test = data
    dictionary = drawn("top_k") if kind == "top_k" else Normalized(drawn("top_k"), "layer_norm")
    found = targeted_probe_perturbation(dictionary, x, labels, n=N, test=test)
    W_dec = np.asarray(drawn("top_k").W_dec, np.float64)
    f = np.asarray(dictionary.encode(jnp.asarray(x)), np.float64)
    if kind == "normalized":  # in the units of the rows
        f = f * x.astype(np.float64).std(1, ddof=1, keepdims=True)
    accuracy, clean = np.zeros((len(N), 3, 3)), np.zeros(3)
    for i in range(3):
        fit = balanced(labels, i, ~test)
        w, b = by_scipy(x, labels == i, fit, 1.0)
        np.testing.assert_allclose(found.probes.weight[i], w, **CLOSE)
        np.testing.assert_allclose(found.probes.bias[i], b, **CLOSE)
        means = [(fit * side) @ f / (fit * side).sum() for side in (labels == i, labels != i)]
        effects = np.maximum(means[0] - means[1], 0) * (W_dec @ w)
        order = np.argsort(-effects, kind="stable")
        np.testing.assert_allclose(found.effects[i], effects[order[: max(N)]], rtol=1e-3, atol=1e-4)
        clean[i] = right(x, found.probes, i, labels == i, balanced(labels, i, test))
        for place, n in enumerate(N):
            gone = edited(dictionary, jnp.asarray(x), [j for j in order[:n] if effects[j] > 0])
            for j in range(3):
                accuracy[place, i, j] = right(gone, found.probes, j, labels == j, balanced(labels, j, test))
    np.testing.assert_allclose(found.clean, clean, **CLOSE)
    np.testing.assert_allclose(found.accuracy, accuracy, **CLOSE)
    own = np.array([[clean[i] - accuracy[n, i, i] for i in range(3)] for n in range(len(N))])
    rest = np.array(
        [
            [np.mean([clean[j] - accuracy[n, i, j] for j in range(3) if j != i]) for i in range(3)]
            for n in range(len(N))
        ]
    )
    np.testing.assert_allclose(found.by_class, own - rest, **CLOSE)
    np.testing.assert_allclose(found.score, (own - rest).mean(1), **CLOSE)
    np.testing.assert_allclose(found.intended, own.mean(1), **CLOSE)
    np.testing.assert_allclose(found.unintended, rest.mean(1), **CLOSE)


def split_classes():
    """Four classes with two features each, of which a row has one, the rows of a class taking turns; and other features."""
    labels, turn = np.repeat(np.arange(4), 20), np.tile(np.arange(2), 40)
    x = np.zeros((80, D), np.float32)
    x[np.arange(80), 2 * labels + turn] = 1
    x[:, 8:] = np.random.default_rng(1).uniform(0, 1, (80, D - 8))
    own = np.zeros((4, D), np.float32)
    own[np.arange(8) // 2, np.arange(8)] = 1
    return x, labels, probe(jnp.asarray(own), jnp.full(4, -0.5))


def test_targeted_probe_perturbation__of_features_of_their_own__has_its_closed_form(caplog):
    x, labels, probes = split_classes()
    found = targeted_probe_perturbation(coordinates(), x, labels, n=(1, 2, 5), test=0.2, probes=probes)
    np.testing.assert_allclose(found.clean, np.ones(4))
    np.testing.assert_allclose(
        found.score, [0.25, 0.5, 0.5]
    )  # half of the class is lost, then all, never the rest
    np.testing.assert_allclose(found.unintended, np.zeros(3))
    np.testing.assert_array_equal(np.sort(found.latents[:, :2]), np.arange(8).reshape(4, 2))
    np.testing.assert_array_equal(found.effects[:, 2:], np.zeros((4, 3)))
    with nothing_compiles(caplog):
        targeted_probe_perturbation(coordinates(), x[::-1], labels, n=(5, 1, 3), test=0.3, probes=probes)


def test_targeted_probe_perturbation__of_latents_that_two_classes_share__counts_against_it():
    x, labels, probes = split_classes()
    merge = np.eye(D, dtype=np.float32)
    merge[:4, :4] = 0
    merge[0, :4] = 1  # one latent for the first two classes: it reads any of their features, and writes all
    arrays = (jnp.asarray(merge.T), jnp.zeros(D), jnp.asarray(merge), jnp.zeros(D))
    shared = ReLU(*arrays, coefficient=jnp.zeros(()))
    found = targeted_probe_perturbation(shared, x, labels, n=(1, 2), test=0.2, probes=probes)
    np.testing.assert_allclose(found.by_class[1], [0.5 - 0.5 / 3, 0.5 - 0.5 / 3, 0.5, 0.5], **CLOSE)
    np.testing.assert_allclose(found.unintended[1], 0.5 / 3 / 2, **CLOSE)


def test_targeted_probe_perturbation__latents_more_active_elsewhere__are_left_alone():
    """With more asked for than have an effect, a naive choice goes on with latents of the rest, and harms these."""
    x, labels, probes = split_classes()
    found = targeted_probe_perturbation(coordinates(), x, labels, test=0.2, n=(10,), probes=probes)
    np.testing.assert_allclose(found.unintended, [0])
    effects = np.asarray(found.effects[0])
    naive = np.asarray(found.latents[0])[np.argsort(-effects, kind="stable")][:10]
    gone = edited(coordinates(), jnp.asarray(x), naive)
    others = [right(gone, found.probes, j, labels == j, np.ones(80)) for j in range(1, 4)]
    assert np.mean(others) < 0.95


@pytest.mark.slow
def test_targeted_probe_perturbation__of_a_random_dictionary__is_about_0():
    rng = np.random.default_rng(3)
    d, labels = 96, np.repeat(np.arange(4), 40)
    x = (rng.normal(size=(160, d)) * 0.3 + 3 * np.eye(4, d)[labels]).astype(np.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    W_enc, W_dec = (jax.random.normal(k, s) for k, s in zip(keys, ((d, d), (d, d)), strict=True))
    W_dec = W_dec / jnp.linalg.norm(W_dec, axis=1, keepdims=True)
    random = ReLU(W_enc / d**0.5, jnp.zeros(d), W_dec, jnp.zeros(d), coefficient=jnp.zeros(()))
    found = targeted_probe_perturbation(random, x, labels, n=(2,))
    assert (found.clean > 0.95).all() and abs(float(found.score[0])) < 0.03
    rows = jnp.eye(d)
    perfect = ReLU(rows, jnp.zeros(d), rows, jnp.zeros(d), coefficient=jnp.zeros(()))
    assert float(targeted_probe_perturbation(perfect, x, labels, n=(2,)).score[0]) > 0.3


def test_numbers__by_default__are_those_that_there_are():
    x, labels, probes = split_classes()
    assert targeted_probe_perturbation(coordinates(), x, labels, probes=probes).n == (2, 5, 10)


def alike(kind, rows, kinds=(0, 1, 2, 3)):
    """What each row counts where kinds of rows count the same."""
    weights = np.zeros(len(kind))
    total = sum((rows & (kind == k)).sum() for k in kinds)
    for k in kinds:
        weights[rows & (kind == k)] = total / len(kinds) / (rows & (kind == k)).sum()
    return weights


def test_spurious_correlation_removal__equals_a_loop_over_edited_rows(data):
    x, _, a, b, test = data
    dictionary, kind = drawn("top_k"), 2 * a + b
    found = spurious_correlation_removal(dictionary, x, a, b, n=N, test=test)
    f, fit, held_out = (
        np.asarray(dictionary.encode(jnp.asarray(x)), np.float64),
        alike(kind, ~test),
        alike(kind, test),
    )
    for i, (y, weights) in enumerate([(a, fit), (b, fit), (a, alike(kind, ~test, (0, 3)))]):
        w, bias = by_scipy(x, y, weights, 1.0)
        np.testing.assert_allclose(found.probes.weight[i], w, **CLOSE)
        np.testing.assert_allclose(found.probes.bias[i], bias, **CLOSE)
    scores = np.zeros((2, len(N)))
    for direction, (wanted, unwanted, own) in enumerate([(a, b, 1), (b, a, 0)]):
        means = [(fit * side) @ f / (fit * side).sum() for side in (unwanted, ~unwanted)]
        w = np.asarray(found.probes.weight[own], np.float64)
        effects = np.abs((means[0] - means[1]) * (np.asarray(dictionary.W_dec, np.float64) @ w))
        order = np.argsort(-effects, kind="stable")
        np.testing.assert_array_equal(found.latents[direction][:5], order[:5])
        before = right(x, found.probes, 2, wanted, held_out)
        oracle = right(x, found.probes, 1 - own, wanted, held_out)
        np.testing.assert_allclose(
            [found.before[direction], found.oracle[direction]], [before, oracle], **CLOSE
        )
        for place, n in enumerate(N):
            gone = edited(dictionary, jnp.asarray(x), order[:n])
            after = right(gone, found.probes, 2, wanted, held_out)
            np.testing.assert_allclose(found.after[direction, place], after, **CLOSE)
            scores[direction, place] = (
                (after - before) / (oracle - before) if oracle - before >= 1e-3 else np.nan
            )
    np.testing.assert_allclose(found.by_direction, scores, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.score, scores[np.argmin(found.before)], rtol=1e-3, atol=1e-3)


def attributes():
    """Two attributes as coordinates of size 1 and either sign, ten rows of each kind, and other features."""
    a, b = np.repeat([0, 0, 1, 1], 10), np.repeat([0, 1, 0, 1], 10)
    x = np.random.default_rng(4).normal(size=(40, D)).astype(np.float32)
    x[:, 0], x[:, 1] = 2 * a - 1, 2 * b - 1
    return x, a, b


def leaning(on_spurious):
    """Probes of either attribute, and one of both."""
    weight = np.zeros((3, D), np.float32)
    weight[0, 0] = weight[1, 1] = weight[2, 0] = 1
    weight[2, 1] = on_spurious
    return probe(jnp.asarray(weight), jnp.zeros(3))


def test_spurious_correlation_removal__of_features_of_their_own__has_its_closed_form():
    x, a, b = attributes()
    found = spurious_correlation_removal(coordinates(both=True), x, a, b, n=(1, 2, 5), probes=leaning(2.0))
    np.testing.assert_allclose(found.before, [0.5, 1.0])  # it says what the spurious attribute says
    np.testing.assert_allclose(found.oracle, [1.0, 1.0])
    np.testing.assert_allclose(found.score, [0.5, 1, 1])
    np.testing.assert_array_equal(np.sort(found.latents[0, :2]), [1, D + 1])
    np.testing.assert_array_equal(np.sort(found.latents[1, :2]), [0, D])
    assert np.isnan(found.by_direction[1]).all()  # nothing to win where the biased probe is right already


def test_spurious_correlation_removal__of_a_probe_that_is_as_bad_either_way__takes_both():
    x, a, b = attributes()
    found = spurious_correlation_removal(coordinates(both=True), x, a, b, n=(1, 2), probes=leaning(1.0))
    np.testing.assert_allclose(found.before, [0.75, 0.75])
    np.testing.assert_allclose(found.by_direction, [[0, 1], [0, 1]])
    np.testing.assert_allclose(found.score, [0, 1])
