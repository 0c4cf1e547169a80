"""Verified nodes against exact sweeps, subsets against runs with all their edits, bounds against Welch's test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mechjax as mj
from mechjax.attribution.diagnosis import _differences, _subsets
from mechjax.attribution.node_scores import node_scores
from mechjax.base.errors import ArgumentError
from tests.tolerances import TOL

KEY = jax.random.key(5)
HOW = {"verify": 3, "subsets": 60, "share": 0.2, "key": KEY}


@pytest.fixture(scope="module")
def found(exact):
    """Estimates of whatever kind."""
    guesses = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3)), jnp.float32)
    return node_scores(
        {"mlp_out": guesses}, exact.clean, None, "mean_of_abs",
        axes=(("mlp_out", ("layer", "pos")),), labels=(), method="guessed", ablation="resample",
    )  # fmt: skip


@pytest.fixture(scope="module")
def diagnosis(model, pair, metric, found):
    return mj.attribution.diagnose(model, *pair, metric, found=found, chunk_size=9, **HOW)


@pytest.fixture(scope="module")
def exact(model, pair, metric):
    return mj.patching.activation_patch(model, *pair, metric, site="mlp_out", mode="noise")


@pytest.fixture(scope="module")
def inside(found, diagnosis):
    """Which nodes each subset has."""
    names = [found.name(i) for i in range(found.flat().size)]
    return np.asarray(_subsets(KEY, jnp.array([n in diagnosis.nodes for n in names]), 60, 12))


def test_diagnose__the_first_nodes__have_the_effects_of_exact_patches_in_order(found, diagnosis, exact):
    truth = dict(
        zip(map(found.name, range(10)), np.asarray(found["mlp_out"].truth(exact)).ravel(), strict=True)
    )
    np.testing.assert_allclose(
        diagnosis.exact, [truth[name] for name in diagnosis.nodes], **TOL["float32", "sweep"]
    )
    assert [name for name, _ in found.top(3)] == list(diagnosis.nodes)
    np.testing.assert_allclose(diagnosis.estimated, np.sort(found.flat())[:-4:-1], **TOL["float32", "law"])


def test_diagnose__subsets__are_runs_with_all_of_their_edits(model, pair, metric, found, diagnosis, inside):
    assert set(inside.sum(0)) == {0, 12}
    assert inside[:4].sum() > 4
    donor = mj.capture(model, "mlp_out")(pair[1])[1]["mlp_out"]

    @jax.jit
    def ran(which):
        edits = [mj.replace("mlp_out", donor[layer], layer=layer, pos=which[layer]) for layer in range(2)]
        return metric(mj.intervene(model, edits)(pair[0])).mean()

    clean = float(ran(jnp.zeros((2, 5), bool)))
    for subset in range(4):
        effect = clean - float(ran(jnp.asarray(inside[subset].reshape(2, 5))))
        assert float(diagnosis.effects[subset]) == pytest.approx(effect, abs=1e-5)


def test_diagnose__clean_equals_corrupt__finds_nothing(model, pair, metric, found):
    same = mj.attribution.diagnose(model, pair[0], pair[0], metric, found=found, chunk_size=9, **HOW)
    for effects in (same.exact, same.effects, same.others):
        np.testing.assert_allclose(effects, np.zeros(effects.shape), **TOL["float32", "law"])
    assert same.largest() < 1e-6


def test_chance__is_the_largest_of_welchs_tests(diagnosis, inside):
    effects = np.asarray(diagnosis.effects, np.float64)
    others = np.flatnonzero(inside.any(0))
    theta = 2 * float(np.abs(diagnosis.others).max())
    groups = [(effects[inside[:, node]], effects[~inside[:, node]]) for node in others]
    test = lambda x, y: stats.ttest_ind(x - theta, y, equal_var=False, alternative="less").pvalue
    tests = [test(sign * x, sign * y) for x, y in groups for sign in (1, -1)]
    assert diagnosis.chance(theta) == pytest.approx(max(tests), rel=1e-3)
    assert diagnosis.chance(float(np.abs(diagnosis.others).max()) / 2) == 1
    assert diagnosis.chance(diagnosis.largest(0.05)) == pytest.approx(0.05, rel=1e-3)


def test_largest__is_no_less_than_what_any_other_node_does(found, diagnosis, exact):
    signed = np.asarray(exact.clean.mean() - exact.scores).ravel()
    of_others = [abs(float(x)) for i, x in enumerate(signed) if found.name(i) not in diagnosis.nodes]
    assert max(of_others) < diagnosis.largest(0.05)
    assert diagnosis.chance(max(of_others)) > 0.05


@pytest.mark.slow
def test_diagnose__named_positions__verifies_those_columns(model, pair, metric):
    named = {"first": jnp.array([0, 1, 2]), "end": jnp.array([4, 4, 4])}
    found = mj.attribution.atp_star(
        model, *pair, metric, sites=("mlp_out",), positions=named, grad_drop=False
    )
    diagnosis = mj.attribution.diagnose(model, *pair, metric, found=found, verify=4, key=KEY)
    exact = mj.patching.activation_patch(model, *pair, metric, site="mlp_out", positions=named, mode="noise")
    truth = {found.name(i): float(x) for i, x in enumerate(found["mlp_out"].truth(exact).ravel())}
    np.testing.assert_allclose(
        diagnosis.exact, [truth[name] for name in diagnosis.nodes], **TOL["float32", "sweep"]
    )
    assert diagnosis.others.size == 0 and diagnosis.chance(1e-6) == 0 and diagnosis.largest() == 0


def test_diagnose__bad_input__is_explained(model, pair, metric, found, diagnosis, as_a_user):
    for message, how in {
        "verify=99: between 1 and all 10 nodes": {"verify": 99},
        "share=0.01: each node is in 1 subsets": {"share": 0.01},
        "chunk_size=0: at least one run at once": {"chunk_size": 0},
    }.items():
        with pytest.raises(ArgumentError, match=message):
            mj.attribution.diagnose(model, *pair, metric, found=found, **HOW | how)
    with pytest.raises(ArgumentError, match="the clean metric is not that of the scores"):
        mj.attribution.diagnose(model, *pair[::-1], metric, found=found, chunk_size=9, **HOW)
    with pytest.raises(
        ArgumentError, match="theta=0: an effect is missed where it exceeds a threshold above 0"
    ):
        diagnosis.chance(0)
    with pytest.raises(ArgumentError, match="chance=2: a probability between 0 and 1/2"):
        diagnosis.largest(2)


def test_differences__of_effects_however_small__have_the_same_freedom():
    rng = np.random.default_rng(0)
    effects, inside = jnp.asarray(rng.normal(size=40), jnp.float32), jnp.asarray(rng.random((40, 3)) < 0.3)
    _, errors, freedom = _differences(effects, inside)
    _, smaller, same = _differences(
        effects * 1e-10, inside
    )  # their variances, squared, are below what float32 has
    np.testing.assert_allclose(same, freedom, **TOL["float32", "gradient"])
    np.testing.assert_allclose(smaller, 1e-10 * errors, rtol=1e-4)
