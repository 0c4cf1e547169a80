"""Causal tracing and attention knockout against whole runs with edits, one at a time."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.patching.windows import windows
from tests.compilations import nothing_compiles
from tests.patching.small import METRIC, PAIR, redrawn
from tests.tolerances import TOL

SWEEP = TOL["float32", "sweep"]
KEY = jax.random.key(5)
SUBJECT = np.array([[0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]], bool)


@pytest.fixture(scope="module")
def model():
    return redrawn()


@pytest.fixture(scope="module")
def traced(model):
    return mj.patching.causal_trace(
        model, PAIR[0], METRIC, subject=SUBJECT, site="mlp_out", window=2, n_samples=2, chunk_size=3, key=KEY
    )


def test_causal_trace__restored_windows__equal_whole_runs_with_the_same_noise(model, traced):
    _, acts = mj.capture(model, ["embed", "mlp_out"])(PAIR[0])
    sigma = np.asarray(acts["embed"])[SUBJECT].std()
    np.testing.assert_allclose(traced.sigma, sigma, **TOL["float32", "law"])
    drowned = 3 * sigma * jax.random.normal(KEY, (2, 3, 5, 8)) * SUBJECT[..., None].astype(np.float32)

    def by_hand(layers, pos):
        held = jnp.isin(jnp.arange(3), jnp.array(layers))
        given_back = mj.replace("mlp_out", acts["mlp_out"], per_layer=True, layer=held, pos=pos)
        runs = [mj.intervene(model, [mj.add("embed", noise), given_back])(PAIR[0]) for noise in drowned]
        return np.mean([METRIC(logits) for logits in runs], 0)

    for layer, layers in (
        (0, [0]),
        (1, [0, 1]),
        (2, [1, 2]),
    ):  # the window of two is cut off at the first layer
        found = traced.per_example[layer, 1] + traced.corrupt
        np.testing.assert_allclose(found, by_hand(layers, 1), **SWEEP)
    noised = [METRIC(mj.intervene(model, [mj.add("embed", noise)])(PAIR[0])) for noise in drowned]
    np.testing.assert_allclose(traced.corrupt, np.mean(noised, 0), **SWEEP)
    np.testing.assert_allclose(traced.clean, METRIC(model(PAIR[0])), **SWEEP)
    np.testing.assert_allclose(traced.total, traced.clean - traced.corrupt, **SWEEP)
    assert np.abs(traced.scores).max() > 1e-2


def test_causal_trace__the_whole_state_of_one_token__gives_everything_back(model):
    """The noise is on the last token alone: its stream entering the first layer is all that it changes."""
    end = jnp.full(3, 4)
    run = lambda key: mj.patching.causal_trace(
        model,
        PAIR[0],
        METRIC,
        subject=end,
        site="resid_pre",
        positions={"S": end - 2, "END": end},
        n_samples=2,
        key=key,
    )
    found = run(KEY)
    np.testing.assert_allclose(found.per_example[:, 1], np.tile(found.total, (3, 1)), **SWEEP)
    np.testing.assert_allclose(found.scores[:, 0], 0, atol=1e-6)  # no later token has changed by then
    assert np.abs(found.total).min() > 1e-2
    assert "@ END" in found.top(1)[0][0]
    np.testing.assert_array_equal(run(KEY).scores, found.scores)
    assert not np.allclose(run(jax.random.key(6)).corrupt, found.corrupt)


def test_windows__of_odd_and_even_width__are_cut_off_at_the_ends():
    expected = {1: ["0", "1", "2", "3"], 2: ["0", "01", "12", "23"], 3: ["01", "012", "123", "23"]}
    for width, rows in expected.items():
        found = ["".join(str(i) for i in np.flatnonzero(row)) for row in np.asarray(windows(width, 4))]
        assert found == rows


@pytest.fixture(scope="module")
def padded():
    """The pairs' clean prompts, two tokens of padding before the second of them."""
    ids = np.array(PAIR[0])
    mask = np.ones(ids.shape, bool)
    ids[1], mask[1] = np.roll(ids[1], 2), np.arange(5) >= 2
    return mj.Prompts(jnp.asarray(ids), jnp.asarray(mask))


def test_attention_knockout__windows_of_padded_prompts__equal_patterns_without_these_keys(model, padded):
    keys = np.array([[1, 2], [2, 3], [0, 3]])
    found = mj.patching.attention_knockout(model, padded, METRIC, queries=-1, keys=keys, window=2)
    blocked = np.zeros((3, 1, 5, 5), bool)
    blocked[np.arange(3)[:, None], 0, 4, keys] = True

    def knocked_out(pattern, _, blocked):
        left = jnp.where(blocked, 0, pattern)
        return left / left.sum(-1, keepdims=True)

    for layer, layers in ((0, [0]), (2, [1, 2])):
        held = jnp.isin(jnp.arange(3), jnp.array(layers))
        edited = mj.intervene(model, [mj.apply("pattern", knocked_out, jnp.asarray(blocked), layer=held)])
        expected = METRIC(model(padded), padded.mask) - METRIC(edited(padded), padded.mask)
        np.testing.assert_allclose(found.per_example[layer], expected, **SWEEP)
    np.testing.assert_allclose(found.scores, found.per_example.mean(-1), **SWEEP)
    np.testing.assert_allclose(found.relative, (found.per_example / found.clean).mean(-1), **SWEEP)
    assert np.abs(found.scores).min() > 1e-3


def test_attention_knockout__of_a_later_key__changes_nothing(model, padded):
    found = mj.patching.attention_knockout(model, padded, METRIC, queries=2, keys=3)
    np.testing.assert_allclose(found.scores, 0, atol=1e-6)
    assert found.window == 3


def test_tracing__other_prompts_and_answers__compile_nothing(model, traced, padded, caplog):
    other = mj.metrics.logit_diff(np.array([6, 7, 8], np.int32), np.array([9, 5, 1], np.int32))
    trace = partial(mj.patching.causal_trace, site="mlp_out", window=2, n_samples=2, chunk_size=3)
    knock = partial(mj.patching.attention_knockout, queries=-1, window=2)
    knock(model, padded, METRIC, keys=np.array([[1, 2], [2, 3], [0, 3]]))
    with nothing_compiles(caplog):
        found = trace(model, PAIR[1], other, subject=~SUBJECT, noise=2.0, key=jax.random.key(6))
        knock(model, padded, other, keys=np.array([[1, 2], [2, 3], [1, 2]]))
    assert np.abs(found.scores - traced.scores).max() > 1e-2


def test_tracing__of_a_run_that_is_not_finite__names_the_first_site(model, padded):
    broken = eqx.tree_at(lambda m: m.blocks.attn.W_V, model, model.blocks.attn.W_V.at[1].set(jnp.inf))
    with pytest.raises(ArgumentError, match="`z` of layer 1 is not finite in this run"):
        mj.patching.causal_trace(
            broken,
            PAIR[0],
            METRIC,
            subject=SUBJECT,
            site="mlp_out",
            window=2,
            n_samples=2,
            chunk_size=3,
            key=KEY,
        )
    with pytest.raises(ArgumentError, match="`z` of layer 1 is not finite in this run"):
        mj.patching.attention_knockout(
            broken, padded, METRIC, queries=-1, keys=np.array([[1, 2], [2, 3], [0, 3]]), window=2
        )


def test_tracing__bad_input__is_explained(model, padded, as_a_user):
    def trace(error, message, prompts=PAIR[0], **more):
        with pytest.raises(error, match=message):
            mj.patching.causal_trace(model, prompts, METRIC, **{"subject": SUBJECT, "key": KEY} | more)

    def knock(error, message, model=model, prompts=PAIR[0], **more):
        with pytest.raises(error, match=message):
            mj.patching.attention_knockout(model, prompts, METRIC, **{"queries": -1, "keys": 1} | more)

    trace(
        SiteError,
        "cannot restore `resid_past`: one of resid_pre.* Did you mean `resid_post`",
        site="resid_past",
    )
    trace(ArgumentError, "window=4: a window holds 1 to 3 layers", window=4)
    trace(ArgumentError, "n_samples=0: at least 1", n_samples=0)
    trace(ArgumentError, "chunk_size=0: at least 1", chunk_size=0)
    trace(ArgumentError, "noise=-1.0: a positive number", noise=-1.0)
    trace(ArgumentError, "subject= marks no token of example 1", subject=SUBJECT & ~SUBJECT[1])
    trace(
        ShapeError, r"subject= is a mask of shape \(3, 4\); the prompts have \(3, 5\)", subject=SUBJECT[:, :4]
    )
    trace(ShapeError, "must be a mask or integer positions; got float64", subject=SUBJECT * 1.0)
    trace(ArgumentError, "subject= marks position 0 of example 1, which is padding", prompts=padded)
    trace(ArgumentError, "positions= is empty", positions={})
    trace(
        ShapeError,
        r"position `END` has shape \(3, 1\); one per example is \(3,\)",
        positions={"END": np.ones((3, 1), int)},
    )
    trace(
        ArgumentError,
        r"positions\['END'\]= names position 5 of example 0, which has 5",
        positions={"END": np.full(3, 5)},
    )
    knock(ArgumentError, "window=0: a window holds 1 to 3 layers", window=0)
    knock(ShapeError, r"keys= has shape \(2,\) for 3 prompts: give one index, one per prompt", keys=[1, 2])
    knock(ArgumentError, "keys= names position -6 of example 0, which has 5 positions", keys=-6)
    knock(ArgumentError, "block every key that position 0 of example 0 sees", queries=0, keys=0)
    near = redrawn(windows=(None, 2, None))
    knock(ArgumentError, "block every key that position 4 of example 0 sees", model=near, keys=[[3, 4]] * 3)
