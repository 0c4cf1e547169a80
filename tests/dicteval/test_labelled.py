"""Rows with labels: how they are checked, encoded, split and counted, for every evaluation that takes them."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dicteval import (
    absorption,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from mechjax.dicteval.classified import classified
from mechjax.dicteval.labelled import decoder, even, labelled, mean_difference
from mechjax.dictionaries import Normalized
from tests.dicteval.by_hand import probe
from tests.dictionaries.kinds import D, drawn, tokens
from tests.tolerances import TOL

CLOSE = TOL["float32", "layout"]
ROWS = 24
LABELS = np.arange(ROWS) % 3
EVALUATIONS = {
    "absorption": absorption,
    "sparse_probing": sparse_probing,
    "spurious_correlation_removal": lambda d, x, labels, **o: spurious_correlation_removal(
        d, x, np.asarray(labels) % 2 == 1, np.arange(len(labels)) % 4 > 1, **o
    ),
    "targeted_probe_perturbation": targeted_probe_perturbation,
}
of_all = pytest.mark.parametrize("name", EVALUATIONS)


@of_all
def test_evaluation__of_rows_that_do_not_fit__says_which(name, as_a_user):
    evaluate, dictionary, x = EVALUATIONS[name], drawn("relu"), tokens(n=ROWS)
    with pytest.raises(
        ShapeError, match=r"labels have shape \(23,\).*one integer or truth value for each of its 24"
    ):
        evaluate(dictionary, x, LABELS[1:])
    with pytest.raises(
        ShapeError, match="x holds vectors of length 5, and this dictionary reads vectors of length 12"
    ):
        evaluate(dictionary, tokens(n=ROWS, d=5), LABELS)
    with pytest.raises(ArgumentError, match=r"2 of 24 rows of x hold NaN or infinity, first rows \[3, 5\]"):
        evaluate(dictionary, x.at[jnp.array([3, 5]), 0].set(jnp.array([jnp.nan, jnp.inf])), LABELS)
    with pytest.raises(ArgumentError, match="to fit probes to and 0 test rows"):
        evaluate(dictionary, x, LABELS, test=np.zeros(ROWS, bool))
    with pytest.raises(ArgumentError, match="0 rows to fit probes to and"):
        evaluate(dictionary, x, LABELS, test=np.ones(ROWS, bool))
    with pytest.raises(ArgumentError, match=r"test=1\.5: give the part of rows that is held out"):
        evaluate(dictionary, x, LABELS, test=1.5)
    with pytest.raises(ShapeError, match=r"test has shape \(3,\).*a truth value for each of 24 rows"):
        evaluate(dictionary, x, LABELS, test=np.ones(3, bool))
    with pytest.raises(ArgumentError, match="l2=-1"):
        evaluate(dictionary, x, LABELS, l2=-1)


def test_evaluation__of_one_class__says_that_it_needs_two():
    for evaluate in (absorption, sparse_probing, targeted_probe_perturbation):
        with pytest.raises(
            ArgumentError, match=r"all 24 labels are \[7\]: a probe tells one class from others"
        ):
            evaluate(drawn("relu"), tokens(n=ROWS), np.full(ROWS, 7))
    for labels, spurious in ((LABELS > 5, LABELS > 0), (LABELS > 0, LABELS > 0)):
        with pytest.raises(ArgumentError, match=r"no row has .*rows of all four kinds are needed"):
            spurious_correlation_removal(drawn("relu"), tokens(n=ROWS), labels, spurious)


def test_evaluation__with_more_latents_than_there_are__says_how_many_there_are():
    x, dictionary = tokens(n=ROWS), drawn("relu")
    with pytest.raises(ArgumentError, match=r"k=\[1, 81\].*80 latents, so ask for 1 to 80"):
        sparse_probing(dictionary, x, LABELS, k=(1, 81))
    with pytest.raises(ArgumentError, match=r"k=81.*80 latents, so ask for 1 to 80"):
        absorption(dictionary, x, LABELS, k=81)
    with pytest.raises(ArgumentError, match=r"n=\[81\]: the dictionary has 80 latents"):
        targeted_probe_perturbation(dictionary, x, LABELS, n=[81])
    with pytest.raises(ArgumentError, match=r"n=\[\]: the dictionary has 80 latents"):
        spurious_correlation_removal(dictionary, x, LABELS > 0, LABELS > 1, n=[])


def test_evaluation__of_what_it_cannot_measure__says_what_would_do(as_a_user):
    x, dictionary = tokens(n=ROWS), drawn("relu")
    narrow = drawn("top_k", d_out=7)
    for evaluate in (absorption, targeted_probe_perturbation):
        with pytest.raises(ShapeError, match=r"reads 12 numbers and writes 7.*give an autoencoder"):
            evaluate(narrow, x, LABELS)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]) if eqx.is_array(leaf) else leaf, dictionary)
    with pytest.raises(ShapeError, match="give a dictionary of one site"):
        sparse_probing(several, x, LABELS)
    with pytest.raises(
        ShapeError, match=r"x has shape \(24,\) and dtype float32: give activations of tokens"
    ):
        sparse_probing(dictionary, x[:, 0], LABELS)
    with pytest.raises(ShapeError, match=r"x has shape \(6, 4, 12\): give activations of tokens"):
        absorption(dictionary, x.reshape(6, 4, D), LABELS[:6])
    with pytest.raises(ShapeError, match=r"mask has shape \(24, 2\).*of texts alone"):
        sparse_probing(dictionary, x, LABELS, mask=np.ones((ROWS, 2), bool))
    with pytest.raises(ArgumentError, match=r"rows \[1\] of the mask have no real token"):
        sparse_probing(dictionary, x.reshape(6, 4, D), LABELS[:6], mask=np.arange(24).reshape(6, 4) // 4 != 1)
    with pytest.raises(
        ArgumentError, match=r"classes=\[9\]: give some of the labels that rows have, \[0, 1, 2\]"
    ):
        sparse_probing(dictionary, x, LABELS, classes=[9])
    with pytest.raises(ShapeError, match=r"probes have weights \(2, 12\).*give \(3, 12\)"):
        targeted_probe_perturbation(dictionary, x, LABELS, probes=probe(jnp.zeros((2, D)), jnp.zeros(2)))
    with pytest.raises(ShapeError, match=r"main has shape \(3, 5\): give truth values \(3, 80\)"):
        absorption(dictionary, x, LABELS, main=np.ones((3, 5), bool))
    with pytest.raises(ArgumentError, match="labels and spurious must be true or false"):
        spurious_correlation_removal(dictionary, x, LABELS, LABELS > 0)
    with pytest.raises(ShapeError, match=r"labels have shape \(24,\), spurious \(23,\)"):
        spurious_correlation_removal(dictionary, x, LABELS > 0, LABELS[1:] > 0)


def test_labelled__a_part_held_out__is_the_last_rows_of_each_label():
    labels = np.array([5, 5, 2, 5, 5, 2, 5, 5, 5, 5])
    rows = labelled(drawn("relu"), tokens(n=10), labels, test=0.3)
    assert rows.labels == (2, 5)
    np.testing.assert_array_equal(~rows.train, [0, 0, 0, 0, 0, 1, 0, 0, 1, 1])  # one of two, two of eight
    np.testing.assert_array_equal(rows.label, labels == 5)


@pytest.mark.parametrize("kind", [None, "layer_norm", "length"])
def test_labelled__of_texts__averages_latents_over_real_tokens(kind, monkeypatch):
    monkeypatch.setattr(
        "mechjax.dicteval.labelled.TOKENS", 9
    )  # two texts at a time, and one text is left over
    inner = drawn("top_k")
    dictionary = inner if kind is None else Normalized(inner, kind)
    x = tokens(n=7 * 4).reshape(7, 4, D)
    mask = np.arange(4) < np.array([4, 1, 3, 4, 2, 4, 1])[:, None]
    spoiled = jnp.where(mask[..., None], x, jnp.nan)  # what stands in padding does not matter
    rows = labelled(dictionary, spoiled, np.arange(7) % 2, test=0.3, mask=mask, written=True)
    f = dictionary.encode(x)
    gone = dictionary.completed(dictionary.decode(f), x) - dictionary.completed(dictionary.decode(0 * f), x)
    mean = lambda z: (np.asarray(z) * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    np.testing.assert_allclose(rows.x, mean(x), **CLOSE)
    np.testing.assert_allclose(np.asarray(rows.f) @ decoder(dictionary), mean(gone), rtol=1e-4, atol=1e-5)
    if kind is None:
        np.testing.assert_allclose(rows.f, mean(f), **CLOSE)
        latents = np.asarray(f)
        naive = np.asarray(
            dictionary.encode(jnp.asarray(mean(x), jnp.float32))
        )  # latents of means are not means of latents
        assert np.abs(naive - mean(latents)).max() > 0.1


def test_even__is_what_drawing_as_many_of_the_rest_gives_on_average():
    label, rows = jnp.array([0] * 6 + [1] * 3 + [2] * 2 + [0]), jnp.arange(12) < 11
    found = jax.jit(even, static_argnums=3)(label, jnp.array([0, 2]), rows, 3)
    np.testing.assert_allclose(found[0], [1] * 6 + [1.0] * 3 + [1.5] * 2 + [0], **CLOSE)
    np.testing.assert_allclose(found[1], [1 / 6] * 6 + [1 / 3] * 3 + [1] * 2 + [0], **CLOSE)
    f = tokens(n=12)
    away = jax.jit(mean_difference)(f, label == jnp.array([[0], [2]]), found)
    f = np.asarray(f)
    np.testing.assert_allclose(away[0], f[:6].mean(0) - (f[6:9].mean(0) + f[9:11].mean(0)) / 2, **CLOSE)


def test_classified__equals_its_definitions_pair_by_pair():
    rng = np.random.default_rng(0)
    margins = np.round(rng.normal(size=40), 1).astype(np.float32)  # so that some are tied
    y, weights = rng.random(40) < 0.4, rng.integers(0, 4, 40).astype(np.float32)
    found = jax.jit(classified)(jnp.asarray(margins), jnp.asarray(y), jnp.asarray(weights))
    w, said = weights.astype(np.float64), margins > 0
    np.testing.assert_allclose(found.accuracy, (w * (said == y)).sum() / w.sum(), **CLOSE)
    precision = (w * (said & y)).sum() / (w * said).sum()
    recall = (w * (said & y)).sum() / (w * y).sum()
    np.testing.assert_allclose(found.f1, 2 * precision * recall / (precision + recall), **CLOSE)
    pairs = [
        (w[i] * w[j], np.sign(margins[i] - margins[j]))
        for i in range(40)
        for j in range(40)
        if y[i] and not y[j]
    ]
    area = sum(of * (1 + sign) / 2 for of, sign in pairs) / sum(of for of, _ in pairs)
    np.testing.assert_allclose(found.auroc, area, **CLOSE)
    nothing = jax.jit(classified)(-jnp.ones(40), jnp.arange(40) < 1, jnp.ones(40))
    np.testing.assert_array_equal([nothing.f1, nothing.auroc], [0, 0.5])


def test_labelled__of_bfloat16__averages_in_float32():
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_array(leaf) else leaf, drawn("relu"))
    x = tokens(n=40).reshape(4, 10, D).astype(jnp.bfloat16)
    rows = labelled(half, x, np.arange(4) % 2, test=0.3)
    assert rows.x.dtype == rows.f.dtype == jnp.float32
    np.testing.assert_allclose(rows.x, x.astype(jnp.float32).mean(1), **CLOSE)
