"""Training: what holds after every step, what is left out, and that circuits of features are found again."""

import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechjax.base.errors import ArgumentError, ShapeError, WriteError
from mechjax.dictionaries import ReLU, TopK
from mechjax.dictlearn import train
from mechjax.dictlearn.plan import ADAM, Plan
from mechjax.dictlearn.resample import resampled
from mechjax.dictlearn.start import geometric_median
from mechjax.dictlearn.step import advanced, begun, turned
from tests.compilations import nothing_compiles
from tests.dictionaries.kinds import KINDS, B, D, F, drawn, tokens
from tests.tolerances import TOL

KEY = jax.random.key(0)


def plan(**changed):
    of = {
        "steps": jnp.int32(10),
        "learning_rate": jnp.float32(1e-2),
        "warm_up": jnp.int32(0),
        "falling": jnp.int32(0),
    }
    of |= {
        "sparsity_warm_up": jnp.int32(0),
        "dead_after": jnp.int32(50),
        "target_l0": None,
        "optimizer": ADAM,
    }
    return Plan(**of | changed)


def batches(n=None, seed=0, **shape):
    seeds = range(seed, seed + n) if n else iter(int, 1)
    return (tokens(one, **shape) for one in seeds)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("relu", "batch_top_k", "jump_relu", "gated")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in KINDS
    ],
)
def test_step__of_every_kind__lowers_the_loss_and_keeps_its_constraints(name):
    dictionary, x = drawn(name), tokens()
    state, seen = begun(dictionary, ADAM), []
    step = eqx.filter_jit(lambda state, i: advanced(state, plan(), x, x, i))
    for i in range(5):
        before = turned(state.dictionary)
        state, measured = step(state, jnp.int32(i))
        now = turned(state.dictionary)
        seen.append(float(measured["loss"]))
        if dictionary.unit_norm:
            np.testing.assert_allclose(now.decoder_norms(), np.ones(F), **TOL["float32", "law"])
        for of in set(dictionary.untrained) - {
            "threshold",
            "n_observed",
            "p",
            "share",
        }:  # those are estimated
            np.testing.assert_array_equal(getattr(now, of), getattr(before, of))
    assert seen[-1] < seen[0]
    assert float(jnp.abs(now.W_enc - dictionary.W_enc).max()) > 1e-3


def test_step__of_unit_rows__moves_across_them():
    """Along a row there is no gradient left, so that what normalising undoes never enters Adam's moments."""
    dictionary, x = drawn("top_k"), tokens()
    state, _ = advanced(begun(dictionary, ADAM), plan(), x, x, jnp.int32(0))
    along = (state.optimizer.mu.W_dec * dictionary.W_dec).sum(-1)
    np.testing.assert_allclose(along, np.zeros(F), atol=1e-7)
    assert float(jnp.abs(state.optimizer.mu.W_dec).max()) > 1e-5


def test_step__of_a_batch_that_is_not_finite__changes_nothing_and_counts():
    state = begun(drawn("batch_top_k"), ADAM)
    after, measured = advanced(
        state, plan(), tokens().at[3, 2].set(jnp.nan), tokens().at[3, 2].set(jnp.nan), jnp.int32(0)
    )
    assert int(after.skipped) == 1 and not np.isfinite(measured["loss"])
    undone = eqx.tree_at(lambda s: s.skipped, after, state.skipped)
    for one, two in zip(jax.tree.leaves(undone), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, two)


def test_step__counts_silence_in_tokens():
    dictionary, x = drawn("top_k"), tokens()
    state, step = begun(dictionary, ADAM), eqx.filter_jit(advanced)
    for i in range(3):
        state, measured = step(state, plan(), x, x, jnp.int32(i))
    kept = np.unique(np.asarray(jax.lax.top_k(dictionary.preactivations(x), 4)[1]))
    never = np.setdiff1d(np.arange(F), kept)
    assert set(np.unique(np.asarray(state.silent))) <= {0, B, 2 * B, 3 * B}
    assert (np.asarray(state.silent)[never] == 3 * B).mean() > 0.5
    _, measured = step(state, plan(dead_after=jnp.int32(3 * B)), x, x, jnp.int32(3))
    assert int(measured["dead"]) == (np.asarray(state.silent) >= 3 * B).sum() > 0


def test_step__with_a_target__steers_sparsity_towards_it():
    state, x = begun(drawn("jump_relu"), ADAM), tokens()
    many, _ = advanced(state, plan(target_l0=jnp.float32(2.0)), x, x, jnp.int32(0))
    few, _ = advanced(state, plan(target_l0=jnp.float32(70.0)), x, x, jnp.int32(0))
    assert float(few.control) < 1 < float(many.control)


def test_train__equals_steps_one_by_one_and_leaves_what_it_was_given():
    dictionary, sgd = (
        drawn("batch_top_k"),
        optax.sgd(0.02),
    )  # Adam makes much of the rounding of gradients near 0
    held = jax.tree.map(np.asarray, jax.tree.leaves(dictionary))
    out = train(
        dictionary, batches(7), steps=7, learning_rate=1.0, key=KEY, optimizer=sgd, normalize=False, centre=False,
        steps_per_call=3, dead_after=50,
    )  # fmt: skip
    state, own = begun(dictionary, sgd), plan(optimizer=sgd, learning_rate=None)
    for i, x in enumerate(batches(7)):
        state, measured = advanced(state, own, x, x, jnp.int32(i))
    expected = turned(state.dictionary)
    for one, two in zip(jax.tree.leaves(out.dictionary), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, **TOL["float32", "layout"])
    assert out.step.tolist() == list(range(1, 8))
    np.testing.assert_allclose(out.history["loss"][-1], measured["loss"], **TOL["float32", "layout"])
    for one, two in zip(jax.tree.leaves(dictionary), held, strict=True):
        np.testing.assert_array_equal(one, two)


def test_train__of_data_in_other_units__is_the_same_in_these():
    """The data are brought to mean square 1 and back: nothing hangs on their units."""
    run = lambda s: train(
        drawn("jump_relu"), (s * x for x in batches(6)), steps=6, learning_rate=1e-2, key=KEY
    )
    small, large = run(1.0), run(64.0)  # a power of two: not a bit differs
    np.testing.assert_array_equal(64 * small.dictionary(tokens(9)), large.dictionary(64 * tokens(9)))
    np.testing.assert_array_equal(small.history["loss"], large.history["loss"])
    np.testing.assert_allclose(
        large.scale[0], np.sqrt(np.mean(np.square([64 * x for x in batches(6)]))), rtol=1e-5
    )


def test_train__after_a_batch_of_large_gradients__goes_on_at_its_pace():
    """Adam divides by the root mean square of a thousand gradients: one that is 900 times as large stops plain Adam."""
    given = [x * (30 if i == 0 else 1) for i, x in enumerate(batches(60))]
    run = lambda unit: train(
        drawn("jump_relu"), given, steps=60, learning_rate=1e-2, key=KEY, normalize=False, centre=False,
        unit_gradients=unit,
    ).history["fvu"]  # fmt: skip
    unit, plain = run(True), run(False)
    np.testing.assert_allclose(unit[0], plain[0], **TOL["float32", "law"])
    assert unit[-1] < 0.6 * plain[-1]


def test_train__of_turned_data__gives_a_turned_dictionary():
    turn = jnp.asarray(np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0], jnp.float32)
    dictionary = drawn("top_k")
    arrays = lambda d: [d.W_enc, d.W_dec, d.b_dec]
    other = eqx.tree_at(
        arrays, dictionary, [turn.T @ dictionary.W_enc, dictionary.W_dec @ turn, dictionary.b_dec @ turn]
    )
    sgd = optax.sgd(0.05)  # Adam takes axes apart
    run = lambda d, stream: train(d, stream, steps=6, learning_rate=1.0, key=KEY, optimizer=sgd).dictionary
    one, two = run(dictionary, batches(6)), run(other, (x @ turn for x in batches(6)))
    np.testing.assert_allclose(one.W_dec @ turn, two.W_dec, **TOL["float32", "gradient"])


def test_train__of_a_transcoder__begins_at_the_means_and_learns_a_skip():
    W = jax.random.normal(KEY, (D, 7))
    pairs = [(x, 3 * x @ W + 5) for x in batches(60)]
    dictionary = TopK.init(d_model=D, n_features=F, k=2, d_out=7, skip=True, key=KEY)
    out = train(dictionary, pairs, steps=60, learning_rate=2e-2, key=KEY)
    assert out.history["fvu"][-1] < 0.2 < out.history["fvu"][0]
    x, y = pairs[0]
    error = jnp.square(out.dictionary(x) - y).sum() / jnp.square(y - y.mean(0)).sum()
    assert error < 0.2
    assert out.scale[0] != out.scale[1]


def test_train__new_numbers__compile_nothing_new(caplog):
    run = lambda rate, coefficient: train(
        ReLU.init(d_model=D, n_features=F, coefficient=coefficient, key=KEY), batches(4), steps=4, learning_rate=rate,
        key=KEY, steps_per_call=2,
    )  # fmt: skip
    run(1e-3, 1.0)
    with nothing_compiles(caplog):
        run(2e-3, 3.0)


def test_geometric_median__is_not_drawn_by_one_far_token():
    x = tokens(n=200)
    far = x.at[0].set(1e4)
    moved = lambda middle: float(jnp.linalg.norm(middle(far) - middle(x)))
    assert moved(geometric_median) < 0.2 < moved(lambda x: x.mean(0))
    middle = geometric_median(x)
    pull = ((x - middle) / jnp.linalg.norm(x - middle, axis=-1, keepdims=True)).sum(0)
    np.testing.assert_allclose(pull, np.zeros(D), atol=1e-3)  # the directions to all tokens cancel


def test_resampled__begins_dead_latents_at_what_is_made_worst():
    dictionary = drawn("relu, l1")
    state = begun(dictionary, ADAM)
    x = tokens().at[4].mul(50.0)  # nearly all of the loss
    state, _ = advanced(state, plan(), x, x, jnp.int32(0))
    dead = np.arange(0, F, 8)
    state = eqx.tree_at(lambda s: s.silent, state, jnp.zeros(F, jnp.int32).at[dead].set(50))
    before, after = turned(state.dictionary), resampled(state, plan(), x, x, KEY)
    now, living = turned(after.dictionary), np.setdiff1d(np.arange(F), dead)
    towards = (x[4] - before.b_dec) / jnp.linalg.norm(x[4] - before.b_dec)
    np.testing.assert_allclose(now.W_dec[dead], np.tile(towards, (len(dead), 1)), **TOL["float32", "layout"])
    length = 0.2 * float(jnp.linalg.norm(before.W_enc[:, living], axis=0).mean())
    np.testing.assert_allclose(
        now.W_enc[:, dead].T, np.tile(length * towards, (len(dead), 1)), **TOL["float32", "layout"]
    )
    assert not np.any(now.b_enc[dead]) and not np.any(after.silent[dead])
    np.testing.assert_array_equal(now.W_enc[:, living], before.W_enc[:, living])
    for moments in (after.optimizer.mu, after.optimizer.nu):
        assert (
            not np.any(moments.W_dec[dead])
            and not np.any(moments.W_enc[dead])
            and not np.any(moments.b_enc[dead])
        )
    np.testing.assert_array_equal(after.optimizer.nu.W_dec[living], state.optimizer.nu.W_dec[living])


def test_train__resamples_after_the_steps_that_were_named():
    run = lambda **o: train(
        drawn("relu, l1"), batches(6), steps=6, learning_rate=1e-2, key=KEY, dead_after=1, **o
    )
    plain, begun_anew = run(), run(resample_at=[3])
    np.testing.assert_array_equal(plain.history["loss"][:3], begun_anew.history["loss"][:3])
    assert (plain.silent > 3 * B).sum() >= (begun_anew.silent > 3 * B).sum() == 0


def test_train__writes_and_tells_every_step(tmp_path):
    told = []
    out = train(
        drawn("top_k"), batches(5), steps=5, learning_rate=1e-2, key=KEY, steps_per_call=2,
        metrics=tmp_path / "run.jsonl", tracker=lambda step, row: told.append((step, row["loss"])),
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    np.testing.assert_allclose([row["loss"] for row in rows], out.history["loss"])
    assert told == [(row["step"], row["loss"]) for row in rows]
    with pytest.raises(WriteError, match="cannot add metrics to"):
        train(drawn("top_k"), batches(2), steps=2, learning_rate=1e-2, key=KEY, metrics=tmp_path)


def test_train__of_batches_that_are_not_finite__stops_or_counts():
    spoilt = lambda: (x.at[0, 0].set(jnp.nan) if i in (2, 3) else x for i, x in enumerate(batches(6)))
    run = lambda how: train(drawn("top_k"), spoilt(), steps=6, learning_rate=1e-2, key=KEY, not_finite=how)
    with pytest.raises(
        ArgumentError, match=r"batch of step 3 holds numbers that are not finite.*not_finite='skip'"
    ):
        run("abort")
    out = run("skip")
    assert int(out.skipped) == 2 and np.isfinite(out.dictionary(tokens())).all()


def test_train__of_constant_activations__is_finite():
    out = train(
        drawn("batch_top_k"), (jnp.ones((B, D)) for _ in range(3)), steps=3, learning_rate=1e-2, key=KEY
    )
    assert np.isfinite(out.dictionary(jnp.ones((2, D)))).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


def test_train__of_what_does_not_fit__says_what_does():
    run = lambda stream, **o: train(
        drawn("top_k"), stream, **{"steps": 3, "learning_rate": 1e-2, "key": KEY} | o
    )
    with pytest.raises(
        ShapeError, match=r"batch of step 1 has shape \(24, 5\), and \(24, 12\) is what is read"
    ):
        run(batches(3, d=5))
    with pytest.raises(ShapeError, match=r"batch of step 2 has shape \(9, 12\), and \(24, 12\)"):
        run([tokens(), tokens(n=9), tokens()])
    with pytest.raises(ArgumentError, match="`batches` ended after 2 of 3 steps"):
        run(batches(2))
    with pytest.raises(ShapeError, match="what is read has 12 numbers and what is made of it 7: give pairs"):
        train(drawn("top_k", d_out=7), batches(2), steps=2, learning_rate=1e-2, key=KEY)
    pairs = [(tokens(), jnp.zeros((B, 5)))] * 2
    with pytest.raises(ShapeError, match=r"has a target of shape \(24, 5\); it should be \(24, 7\)"):
        train(drawn("top_k", d_out=7), pairs, steps=2, learning_rate=1e-2, key=KEY)
    with pytest.raises(ArgumentError, match="steps=0"):
        run(batches(3), steps=0)
    with pytest.raises(ArgumentError, match=r"learning_rate=-1.0"):
        run(batches(3), learning_rate=-1.0)
    with pytest.raises(ArgumentError, match="decay=2"):
        run(batches(3), decay=2.0)
    with pytest.raises(ArgumentError, match=r"resample_at=\[3\]: step 3 is not within 1 to 2"):
        run(batches(3), resample_at=[3])
