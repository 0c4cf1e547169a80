"""Evaluations against what SAEBench 0.6.0 computes from the same arrays (`tests/oracles/make_sae_bench.py`)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.dicteval import (
    absorption,
    sparse_probing,
    spurious_correlation_removal,
    targeted_probe_perturbation,
)
from mechjax.dictionaries import ReLU
from tests.dicteval.by_hand import probe
from tests.tolerances import TOL

CLOSE = TOL["float32", "gradient"]


@pytest.fixture(scope="module")
def bench():
    with np.load(Path(__file__).parents[1] / "oracles" / "sae_bench.npz") as file:
        return dict(file)


def of(bench, name):
    """The dictionary, and its texts: what is read, which tokens are real, and which texts are held out."""
    arrays = [jnp.asarray(bench[f"{name}_{a}"]) for a in ("W_enc", "b_enc", "W_dec", "b_dec")]
    parts = [bench[f"{name}_{part}"] for part in ("train", "test")]
    x = np.concatenate(parts)
    test = np.arange(len(x)) >= len(parts[0])
    return ReLU(*arrays, coefficient=jnp.zeros(())), x, (x.sum(-1) != 0), test


def labels(bench, name, n):
    """Labels of n classes, as many texts of each."""
    return np.concatenate(
        [np.repeat(np.arange(n), len(bench[f"{name}_{p}"]) // n) for p in ("train", "test")]
    )


def placed(found, n_features):
    """Effects of all latents, from those in order."""
    effects = np.zeros((len(found.effects), n_features))
    np.put_along_axis(effects, np.asarray(found.latents), np.asarray(found.effects), 1)
    return effects


def test_sparse_probing__equals_saebenchs_accuracies(bench):
    dictionary, x, mask, test = of(bench, "two")
    found = sparse_probing(dictionary, x, labels(bench, "two", 2), mask=mask, test=test)
    np.testing.assert_allclose(found.accuracy[:3, 0], bench["two_accuracy_f"], **CLOSE)
    np.testing.assert_allclose(found.accuracy[4:7, 0], bench["two_accuracy_x"], **CLOSE)
    assert len(np.unique(bench["two_accuracy_f"])) > 1


def test_targeted_probe_perturbation__of_two_classes__equals_saebenchs(bench):
    dictionary, x, mask, test = of(bench, "two")
    n = tuple(int(i) for i in bench["N"])
    probes = probe(jnp.asarray(bench["two_weight"]), jnp.asarray(bench["two_bias"]))
    options = {"mask": mask, "test": test, "probes": probes}
    every = targeted_probe_perturbation(
        dictionary, x, labels(bench, "two", 2), n=(dictionary.n_features,), **options
    )
    np.testing.assert_allclose(
        placed(every, dictionary.n_features), bench["two_effects"], rtol=1e-4, atol=1e-5
    )
    found = targeted_probe_perturbation(dictionary, x, labels(bench, "two", 2), n=n, **options)
    np.testing.assert_allclose(found.clean, bench["two_clean"], **CLOSE)
    enough = (bench["two_effects"] > 0).sum(1) >= np.array(n)[:, None]  # past these it goes on with others
    assert enough[:2].all()
    np.testing.assert_allclose(np.asarray(found.accuracy)[enough], bench["two_after"][enough], **CLOSE)
    np.testing.assert_allclose(
        np.asarray(found.score)[enough.all(1)], bench["two_score"][enough.all(1)], **CLOSE
    )


def test_targeted_probe_perturbation__of_four_classes__is_what_saebenchs_draws_are_on_average(bench):
    dictionary, x, mask, test = of(bench, "four")
    n = tuple(int(i) for i in bench["N"])
    probes = probe(jnp.asarray(bench["four_weight"]), jnp.asarray(bench["four_bias"]))
    found = targeted_probe_perturbation(
        dictionary, x, labels(bench, "four", 4), n=n, mask=mask, test=test, probes=probes
    )
    errors = lambda name: 4 * bench[f"four_{name}_error"] + 1e-5
    assert (np.abs(found.clean - bench["four_clean"]) < errors("clean")).all()
    effects = placed(found, dictionary.n_features)
    shown = effects > np.asarray(found.effects)[:, -1:]
    # a mean of what is cut off at 0 is not what the mean is cut off at: only clear effects are compared
    clear = shown & (bench["four_effects"] > 20 * bench["four_effects_error"])
    assert clear.sum() > 8
    assert (np.abs(effects - bench["four_effects"]) < errors("effects"))[clear].all()


def test_spurious_correlation_removal__equals_saebenchs(bench):
    dictionary, x, mask, test = of(bench, "scr")
    n, kind = tuple(int(i) for i in bench["N"]), labels(bench, "scr", 4)
    probes = probe(jnp.asarray(bench["scr_weight"]), jnp.asarray(bench["scr_bias"]))
    options = {"mask": mask, "test": test, "probes": probes}
    every = spurious_correlation_removal(
        dictionary, x, kind // 2, kind % 2, n=(dictionary.n_features,), **options
    )
    np.testing.assert_allclose(
        placed(every, dictionary.n_features), bench["scr_effects"], rtol=1e-4, atol=1e-5
    )
    found = spurious_correlation_removal(dictionary, x, kind // 2, kind % 2, n=n, **options)
    ours = np.nan_to_num(found.by_direction)  # where there is nothing to win, it says 0
    np.testing.assert_allclose(ours, bench["scr_by_direction"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.score, bench["scr_score"], rtol=1e-4, atol=1e-4)
    assert np.abs(bench["scr_score"]).max() > 0.2


@pytest.mark.parametrize("place", range(3))
def test_absorption__of_each_row__equals_saebenchs(bench, place):
    arrays = [jnp.asarray(bench[f"abs_{a}"]) for a in ("W_enc", "b_enc", "W_dec", "b_dec")]
    dictionary, x = ReLU(*arrays, coefficient=jnp.zeros(())), bench["abs_x"]
    rows = np.arange(len(x))
    found = absorption(
        dictionary, x, (rows >= 4).astype(np.int32), test=rows % 4 > 0, classes=[1], main=bench["abs_main"][[place]],
        probes=probe(jnp.asarray(bench["abs_weight"][[place]]), jnp.full(1, 100.0)),
    )  # fmt: skip
    judged = (rows >= 4) & (rows % 4 > 0)
    np.testing.assert_array_equal(np.isfinite(found.of_row), judged)
    np.testing.assert_allclose(
        found.of_row[judged], bench["abs_fraction"][place][judged], rtol=1e-4, atol=1e-4
    )
    absorbed = np.asarray(found.absorber)[judged]
    np.testing.assert_array_equal(absorbed >= 0, bench["abs_full"][place][judged])
    np.testing.assert_array_equal(absorbed[absorbed >= 0], bench["abs_top"][place][judged][absorbed >= 0])
    parts = np.asarray(found.of_row)[judged]
    assert (parts > 0).any() and (parts == 0).any()


@pytest.mark.slow
def test_absorption__main_latents__are_saebenchs(bench):
    dictionary, x, _, test = of(bench, "split")
    found = absorption(dictionary, x, labels(bench, "split", 4), test=test, k=6)
    np.testing.assert_array_equal(found.n_main, bench["split_n"])
    for own, theirs, n in zip(found.latents, bench["split_latents"], bench["split_n"], strict=True):
        np.testing.assert_array_equal(own[: int(n)], theirs[: int(n)])
    assert bench["split_n"].max() > 1
    same = np.asarray(found.latents) == bench["split_latents"]
    prefix = np.cumprod(same, 1).astype(bool)
    assert np.abs(np.asarray(found.f1) - bench["split_f1"])[prefix].max() < 0.02  # scikit-learn stops at 1e-4
