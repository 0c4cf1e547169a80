"""SynthSAEBench: what dictionaries found of a world, judged by what is known of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dicteval import detection, reconstruction, recovery
from mechjax.dictionaries import JumpReLU, TopK
from mechjax.studies.synth_bench import judged, stream, synth_bench
from mechjax.tasks.synthetic_world import synth_sae_bench
from tests.tolerances import TOL

KEY, D, F = jax.random.key(0), 96, 64


@pytest.fixture(scope="module")
def world():
    return synth_sae_bench(jax.random.key(3), scale=1 / 64)


@pytest.fixture(scope="module")
def fresh():
    return TopK.init(d_model=D, n_features=F, k=3, key=jax.random.key(1))


@pytest.fixture(scope="module")
def knowing(world):
    """A latent for each of the first features, that reads and writes along it and fires at half its size."""
    given = JumpReLU.init(d_model=D, n_features=F, key=KEY)
    rows = world.features[:F]
    return eqx.tree_at(
        lambda d: (d.W_enc, d.W_dec, d.b_dec, d.b_enc, d.threshold),
        given,
        (rows.T, rows, world.bias, -rows @ world.bias, jnp.full(F, 2.5)),
    )


def test_judged__of_latents_that_are_features__finds_them_all(world, knowing, fresh):
    found = judged(world, {"knowing": knowing, "fresh": fresh}, key=KEY, samples=2048, batch=1024)
    assert found.axis_labels() == {"dictionary": ("knowing", "fresh")}
    np.testing.assert_allclose(found.mcc[0], 1, **TOL["float32", "parity"])
    assert float(found.unique[0]) == 1
    assert float(found.f1[0]) > 0.6 > 3 * float(found.f1[1])
    assert float(found.mcc[1]) < 0.5


def test_judged__is_what_each_measure_says_of_the_same_samples(world, knowing):
    found = judged(world, {"it": knowing}, key=KEY, samples=2048, batch=1024)
    drawn = [world.sample(jax.random.fold_in(KEY, n), 1024) for n in range(2)]
    made, fires = reconstruction(knowing, [x for x, _ in drawn]), detection(knowing, drawn, world.features)
    expected = {
        "f1": fires.f1.mean(), "precision": fires.precision.mean(), "recall": fires.recall.mean(),
        "mcc": recovery(knowing, world.features).mcc, "unique": fires.unique, "explained": 1 - made.fvu,
        "l0": made.l0, "dead": made.dead, "gamma": made.gamma,
    }  # fmt: skip
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), [value], **TOL["float32", "law"], err_msg=name)


@pytest.mark.slow
def test_synth_bench__trains_what_it_judges(world, fresh):
    start = judged(world, {"top_k": fresh}, key=KEY, samples=2048)
    found = synth_bench(
        world, {"top_k": fresh}, key=KEY, steps=120, learning_rate=3e-3, batch=256, samples=2048, normalize=False,
    )  # fmt: skip
    assert float(found.mcc[0]) > float(start.mcc[0]) + 0.1
    assert float(found.explained[0]) > 0.5 > float(start.explained[0])
    assert found.names == ("top_k",)


def test_stream__of_a_key__gives_each_step_its_own_samples(world):
    three = list(stream(world, KEY, batch=16, steps=3))
    again = list(stream(world, KEY, batch=16, steps=2))
    np.testing.assert_array_equal(np.stack(three[:2]), np.stack(again))
    assert len(three) == 3 and not (three[0] == three[1]).all()


def test_synth_bench__of_what_cannot_be__says_what_can(world, fresh):
    with pytest.raises(ArgumentError, match="`dictionaries` is empty: give at least one"):
        synth_bench(world, {}, key=KEY, steps=1, learning_rate=1e-3)
    with pytest.raises(ArgumentError, match="samples=1, batch=1: variance needs two"):
        judged(world, {"it": fresh}, key=KEY, samples=1)
    narrow = TopK.init(d_model=8, n_features=F, k=3, key=KEY)
    with pytest.raises(ShapeError, match="reads vectors of length 8"):
        judged(world, {"it": narrow}, key=KEY, samples=64)
