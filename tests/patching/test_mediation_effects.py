"""Mediation effects against whole runs with edits, a model that is linear, and intervals drawn by hand."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, PairingError
from mechjax.patching import PatchScores
from tests.patching.small import METRIC, PAIR, redrawn
from tests.tolerances import TOL

SWEEP = TOL["float32", "sweep"]
KEY = jax.random.key(9)


def both(model, metric, **more):
    sweep = {"site": "z", "over": ("layer", "head")} | more
    return [mj.patching.activation_patch(model, *PAIR, metric, mode=m, **sweep) for m in ("denoise", "noise")]


@pytest.fixture(scope="module")
def model():
    return redrawn()


@pytest.fixture(scope="module")
def sweeps(model):
    return both(model, mj.metrics.prob(METRIC.correct))


def test_mediation_effects__of_one_head__equal_whole_runs(model, sweeps):
    prob = mj.metrics.prob(METRIC.correct)
    runs = [mj.capture(model, "z")(ids) for ids in PAIR]
    with_z = lambda ids, acts: prob(
        mj.intervene(model, [mj.replace("z", acts["z"][1], layer=1, head=0)])(ids)
    )
    (clean, acts), (corrupt, other) = runs
    null, full = prob(corrupt), prob(clean)
    for scale, unit in (("difference", 1.0), ("ratio", null)):
        found = mj.patching.mediation_effects(*sweeps, scale=scale, key=KEY)
        direct, indirect = ((y - null) / unit for y in (with_z(PAIR[0], other), with_z(PAIR[1], acts)))
        total = (full - null) / unit
        for name, expected in (("total", total), ("direct", direct), ("indirect", indirect)):
            np.testing.assert_allclose(found[name][1, 0], expected.mean(), **SWEEP)
        np.testing.assert_allclose(found.per_example[3, 1, 0], total - direct - indirect, **SWEEP)
        assert np.abs(found["interaction"]).max() > 1e-3


def test_mediation_effects__of_a_linear_model__add_up():
    """Attention that looks everywhere alike, no MLPs, no norms: the sum of what the mediator does and the rest."""
    bare = redrawn(norms="none", mlp="none")
    linear = eqx.tree_at(lambda m: (m.blocks.attn.W_Q, m.blocks.attn.b_Q), bare, replace_fn=jnp.zeros_like)
    found = mj.patching.mediation_effects(*both(linear, METRIC), key=KEY)
    scale = float(np.abs(found.values).max())
    np.testing.assert_allclose(found["interaction"] / scale, 0, **SWEEP)
    np.testing.assert_allclose(
        found["direct"] + found["indirect"], found["total"], rtol=1e-5, atol=1e-5 * scale
    )
    assert np.abs(found["direct"]).min() > 1e-3 and np.abs(found["indirect"]).min() > 1e-3


def drawn_scores(mode, n=40, **more):
    """A sweep of three places with made-up effects, many examples."""
    rng = np.random.default_rng(0)
    corrupt, clean = rng.normal(1, 0.2, n), rng.normal(4, 0.2, n)
    places = rng.normal({"denoise": 2, "noise": 3}[mode], 0.5, (3, n))
    fields = {"site": "z", "over": ("pos",), "mode": mode, "labels": (("pos", ("A", "B", "C")),)} | more
    arrays = [jnp.asarray(x, jnp.float32) for x in (places.mean(-1), places, clean, corrupt)]
    return PatchScores(*arrays, **fields)


def test_mediation_effects__intervals__are_those_of_the_mean():
    sweeps = drawn_scores("denoise"), drawn_scores("noise")
    found = mj.patching.mediation_effects(*sweeps, n_bootstrap=4000, level=0.9, key=KEY)
    per_example = np.asarray(found.per_example, np.float64)
    error = 1.645 * per_example.std(-1) / np.sqrt(40)  # normal, as means of forty are
    np.testing.assert_allclose(found.high - found.values, error, rtol=0.1)
    np.testing.assert_allclose(found.values - found.low, error, rtol=0.1)
    again = mj.patching.mediation_effects(*sweeps, n_bootstrap=4000, level=0.9, key=KEY)
    np.testing.assert_array_equal(again.low, found.low)
    assert found.top(1)[0][0].startswith("total @ ")
    row = found.rows()[3]
    assert (row["effect"], row["pos"]) == ("direct", "A")
    assert row["low"] < row["values"] < row["high"]


def test_mediation_effects__bad_input__is_explained(as_a_user):
    there, back = drawn_scores("denoise"), drawn_scores("noise")

    def refused(error, message, there=there, back=back, **more):
        with pytest.raises(error, match=message):
            mj.patching.mediation_effects(there, back, **{"key": KEY} | more)

    refused(
        ArgumentError,
        "have mode='noise' and mode='denoise': give the one with mode='denoise' first",
        back,
        there,
    )
    refused(
        PairingError, "site='z' and site='q': sweep the same places", back=drawn_scores("noise", site="q")
    )
    refused(PairingError, "metrics of the clean run differ", back=drawn_scores("noise", n=30))
    refused(ArgumentError, "scale='log': expected 'difference' or 'ratio'", scale="log")
    refused(ArgumentError, r"level=95: between 0 and 1", level=95)
    refused(ArgumentError, "n_bootstrap=0", n_bootstrap=0)
    turned = [eqx.tree_at(lambda s: s.corrupt, sweep, sweep.corrupt - 1) for sweep in (there, back)]
    refused(ArgumentError, "divides by the metric of the corrupt run, which is -0", *turned, scale="ratio")
    with pytest.raises(ArgumentError, match="no effect is called 'nde'; there are total, direct"):
        mj.patching.mediation_effects(there, back, key=KEY)["nde"]
