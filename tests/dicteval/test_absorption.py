"""Absorption: planted at a known rate it is found at that rate, and each row equals the definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.dicteval import absorption
from mechjax.dictionaries import Normalized, ReLU
from tests.dicteval.by_hand import probe
from tests.dictionaries.kinds import F, drawn, tokens
from tests.tolerances import TOL

CLOSE = TOL["float32", "gradient"]
CLASSES, WORDS, EACH = 2, 25, 8
D = CLASSES + CLASSES * WORDS


def spelled():
    """Words of two classes, each `EACH` times: a row is its class's direction, its word's, and a little noise."""
    label = np.repeat(np.arange(CLASSES), WORDS * EACH)
    word = np.tile(np.repeat(np.arange(WORDS), EACH), CLASSES)
    x = np.zeros((len(label), D), np.float32)
    x[np.arange(len(label)), label] = 1
    x[np.arange(len(label)), CLASSES + WORDS * label + word] = 1
    held_out = np.tile(np.arange(EACH) >= EACH // 2, CLASSES * WORDS)
    return x, label, word, held_out


def absorbing(words, part=1.0, scale=1.0):
    """A perfect dictionary of it: a latent for each class and each word.

    Those of the first `words` words of the first class write `part` of the class's direction too, and its latent
    holds that much less on them. Rows of the decoder are `scale` long.
    """
    decoder, encoder = np.eye(D), np.eye(D)
    for word in range(words):
        decoder[CLASSES + word, 0] = part
        encoder[CLASSES + word, 0] -= part  # what the class's latent reads of this word
    lengths = np.linalg.norm(decoder, axis=1) / scale
    arrays = [
        jnp.asarray(z, jnp.float32) for z in (encoder * lengths, np.zeros(D), decoder / lengths[:, None])
    ]
    return ReLU(*arrays, jnp.zeros(D), coefficient=jnp.zeros(()))


def directions():
    """Probes along the classes' directions, which words do not move."""
    return probe(jnp.eye(CLASSES, D), jnp.full(CLASSES, -0.5))


@pytest.fixture(scope="module")
def planted():
    """Five of 25 words absorb the first class, and none the second."""
    x, label, _, held_out = spelled()
    return absorption(absorbing(5), x, label, test=held_out, classes=(0, 1), probes=directions())


def test_absorbing__is_a_perfect_dictionary():
    x = spelled()[0]
    for dictionary in (absorbing(0), absorbing(5), absorbing(7, 0.5, 3.0)):
        np.testing.assert_allclose(dictionary(jnp.asarray(x)), x, **CLOSE)


def test_absorption__planted_at_a_known_rate__is_found_at_that_rate(planted):
    x, _, word, held_out = spelled()
    np.testing.assert_array_equal(planted.judged, [WORDS * EACH // 2] * 2)
    np.testing.assert_array_equal(planted.n_main, [1, 1])
    np.testing.assert_array_equal(planted.latents[:, 0], [0, 1])
    np.testing.assert_allclose(planted.full, [5 / WORDS, 0], **CLOSE)
    np.testing.assert_allclose(planted.fraction, [5 / WORDS, 0], **CLOSE)
    np.testing.assert_allclose(planted.probe_f1, [1, 1])
    np.testing.assert_allclose(planted.f1[:, 0], [1 / (1 + 0.1 / 0.8), 1], **CLOSE)  # a fifth is missed
    np.testing.assert_allclose([planted.mean_full, planted.mean_fraction], [0.1, 0.1], **CLOSE)
    taken = np.isfinite(planted.of_row) & (np.asarray(planted.of_row) > 0)
    np.testing.assert_array_equal(taken, held_out & (word < 5) & (np.arange(len(x)) < len(x) / 2))
    np.testing.assert_array_equal(np.asarray(planted.absorber)[taken], CLASSES + word[taken])
    assert (np.asarray(planted.absorber)[~taken] == -1).all()
    np.testing.assert_array_equal(np.isnan(planted.of_row), ~held_out)


def test_absorption__where_none_is_planted__is_0(planted):
    x, label, _, held_out = spelled()
    found = absorption(absorbing(0), x, label, test=held_out, classes=(0, 1), probes=directions())
    for measure in (found.full, found.fraction):
        np.testing.assert_array_equal(measure, np.zeros(2))


def test_absorption__in_part__is_that_part(planted):
    """Half of the class's direction written by the word's latent: its own latent is active, so none is full."""
    x, label, _, held_out = spelled()
    found = absorption(absorbing(5, 0.5), x, label, test=held_out, classes=(0, 1), probes=directions())
    np.testing.assert_array_equal(found.full, [0, 0])
    np.testing.assert_allclose(found.fraction, [0.5 * 5 / WORDS, 0], **CLOSE)
    little = absorption(absorbing(5, 0.3), x, label, test=held_out, classes=(0, 1), probes=directions())
    np.testing.assert_array_equal(little.fraction, [0, 0])  # less than 0.4 of the projection is no absorption


def test_absorption__of_longer_rows_of_the_decoder__is_the_same(planted):
    x, label, _, held_out = spelled()
    found = absorption(absorbing(5, 1.0, 30.0), x, label, test=held_out, classes=(0, 1), probes=directions())
    np.testing.assert_allclose(found.full, planted.full, **CLOSE)
    np.testing.assert_allclose(found.fraction, planted.fraction, **CLOSE)


@pytest.mark.slow
def test_absorption__with_probes_of_its_own__finds_it_too():
    """Words tell the class as well, so fitted probes lean on them a little: the rate is the same."""
    x, label, _, held_out = spelled()
    noise = 0.05 * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)
    rows = absorbing(5)
    biased = ReLU(rows.W_enc, rows.b_enc - 0.3, rows.W_dec, rows.b_dec, coefficient=rows.coefficient)
    both = absorption(biased, x + noise, label, test=held_out, classes=(0, 1))
    np.testing.assert_allclose(both.full, [5 / WORDS, 0], **CLOSE)
    assert (both.probes.residual < 1e-6).all()


def by_definition(x, f, W_dec, u, main, *, share=0.4, cosine=0.1, full_cosine=0.025, absorbers=3):
    """One row, step by step."""
    lengths = np.linalg.norm(W_dec, axis=1)
    u = u / np.linalg.norm(u)
    put, cosines, p = f * (W_dec @ u), W_dec @ u / lengths, x @ u
    top = int(put.argmax())
    full = (
        not (main & (f * lengths >= 1e-8)).any()
        and cosines[top] >= full_cosine
        and p > 0
        and put[top] >= share * p
    )
    by_main = put[main].sum()
    others = sorted(
        (put[j] for j in range(len(f)) if not main[j] and cosines[j] >= cosine and put[j] > 0), reverse=True
    )
    by_others = sum(others[:absorbers])
    if by_main >= p or by_others < share * p or p <= 0:
        return full, top, 0.0
    if by_main <= 0:
        return full, top, 1.0
    part = min(by_others, p - by_main)
    return full, top, float(np.clip(part / (part + by_main), 0, 1))


@pytest.mark.parametrize("kind", ["top_k", "normalized"])
def test_absorption__row_by_row__equals_its_definition(kind):
    n = 200
    x, rng = np.asarray(tokens(n=n)), np.random.default_rng(5)
    inner = drawn("top_k")
    dictionary = inner if kind == "top_k" else Normalized(inner, "length")
    W_dec = np.asarray(inner.W_dec, np.float64)
    u = W_dec[:2] + 0.15 * rng.normal(size=(2, 12))
    probes = probe(
        jnp.asarray(u, jnp.float32), jnp.full(2, 2.0)
    )  # so that rows of negative projection are judged too
    main = rng.random((2, F)) < 0.04
    labels, held_out = np.arange(n) % 2, np.arange(n) >= 10
    found = absorption(dictionary, x, labels, test=held_out, classes=(0, 1), probes=probes, main=main)
    f = np.asarray(dictionary.encode(jnp.asarray(x)), np.float64)
    if kind == "normalized":
        f = f * np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(12)
    full, fraction, judged = np.zeros(2), np.zeros(2), np.zeros(2)
    for i in range(n):
        c = labels[i]
        if not held_out[i] or x[i] @ u[c] + 2 <= 0:
            assert np.isnan(found.of_row[i])
            continue
        is_full, top, part = by_definition(x[i].astype(np.float64), f[i], W_dec, u[c], main[c])
        np.testing.assert_allclose(found.of_row[i], part, rtol=1e-4, atol=1e-4)
        assert int(found.absorber[i]) == (top if is_full else -1)
        full[c] += is_full
        fraction[c] += part
        judged[c] += 1
    np.testing.assert_allclose(found.full, full / judged, **CLOSE)
    np.testing.assert_allclose(found.fraction, fraction / judged, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.judged, judged)
    np.testing.assert_array_equal(found.n_main, main.sum(1))
    assert 0 < full.sum() < judged.sum() and ((fraction / judged) % 1 > 0.05).all()  # all branches are taken
