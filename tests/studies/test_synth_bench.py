"""The study on SynthSAEBench's world: scores of a dictionary that knows the truth, and short runs of those that learn."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries import JumpReLU
from mechjax.studies import synth_bench as study
from mechjax.studies.synth_bench import (
    KINDS,
    PUBLISHED,
    SCORES,
    Size,
    judged_by,
    learned,
    stream,
    synth_bench,
)
from mechjax.tasks.synthetic_world import synth_sae_bench
from tests.tolerances import TOL

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def short():
    return synth_bench(
        ("top_k", "batch_top_k"), key=KEY, scale=1 / 64, samples=60 * 1024, held_out=4096, n_seeds=2
    )


def test_size__of_each_scale__is_the_benchmarks_in_proportion():
    of = lambda scale, d: Size.of(type("World", (), {"features": np.zeros((1, d))})(), scale)
    assert of(1, 768) == Size(768, 4096, 25, (128, 512, 2048, 4096))
    assert of(1 / 16, 192) == Size(192, 256, 6, (8, 32, 128, 256))
    assert of(1 / 64, 96) == Size(96, 64, 3, (2, 8, 32, 64))


def test_judged_by__of_a_dictionary_that_inverts_the_world__is_whole():
    world = synth_sae_bench(
        KEY, scale=1 / 64, d_model=320
    )  # more dimensions than features: every activation shows
    inverse = np.linalg.pinv(np.asarray(world.features, np.float64))
    whole = JumpReLU(
        jnp.asarray(inverse, jnp.float32), jnp.asarray(-np.asarray(world.bias) @ inverse, jnp.float32), world.features,
        world.bias, centred=False, threshold=jnp.full(256, 1e-3), bandwidth=jnp.ones(()), coefficient=jnp.ones(()),
        target=jnp.ones(()), penalty="step",
    )  # fmt: skip
    held = lambda: stream(world, KEY, 4)
    found = judged_by(whole, held, world.features)
    there = np.concatenate([np.asarray(a > 0) for _, a in held()])
    seen = there.any(0).mean()  # a feature that was never there cannot be detected
    assert found["f1"] == pytest.approx(seen, abs=2e-3) and found["dead"] == pytest.approx(1 - seen, abs=1e-2)
    assert found["l0"] == pytest.approx(there.sum(-1).mean(), rel=2e-3)
    for name in ("mcc", "unique", "explained", "shrinkage"):
        assert found[name] == pytest.approx(1, abs=1e-3), name
    halved = judged_by(eqx.tree_at(lambda d: d.W_dec, whole, 0.5 * world.features), held, world.features)
    assert halved["f1"] == found["f1"] and 0.5 < halved["shrinkage"] < 0.6
    assert halved["explained"] < 0.8


def test_synth_bench__short_runs__find_more_than_they_began_with(short):
    assert short.f1.shape == (2, 2) and short.kinds == ("top_k", "batch_top_k") and short.samples == 60 * 1024
    world = synth_sae_bench(jax.random.split(KEY, 3)[0], scale=1 / 64)
    size = Size.of(world, 1 / 64)
    fresh = KINDS["top_k"](size, d_model=96, n_features=64, key=KEY)
    begun = judged_by(fresh, lambda: stream(world, KEY, 4), world.features)
    assert short.f1.min() > 3 * begun["f1"] and short.explained.min() > begun["explained"]
    assert np.abs(short.l0[0] - 3).max() < 0.1
    assert (short.f1[:, 0] != short.f1[:, 1]).all()


def test_table__of_a_study__has_a_line_for_each_kind(short):
    lines = short.table().splitlines()
    assert lines[0] == f"| kind | {' | '.join(SCORES)} |" and len(lines) == 4
    mean, spread = short.f1[0].mean(), short.f1[0].std(ddof=1)
    assert lines[2].startswith(f"| top_k | {mean:.4f} ± {spread:.4f} | ")
    assert "highest at kind=" in repr(short) or "batch_top_k" in repr(short)
    whole = eqx.tree_at(lambda s: s.f1, study.SynthBench(**{n: getattr(short, n) for n in SCORES}, kinds=short.kinds,
                        samples=1, scale=1), short.f1)  # fmt: skip
    told = whole.table().splitlines()
    assert len(told) == 5 and told[4].startswith(
        "| published | 0.7316 ± 0.0010 |  |  | 0.7574 ± 0.0003 | 0.9837"
    )


def test_published__kinds__are_kinds_of_the_study():
    assert set(PUBLISHED) <= set(KINDS) and all(set(told) <= set(SCORES) for told in PUBLISHED.values())


def test_synth_bench__of_what_is_not_there__says_what_is():
    with pytest.raises(
        ArgumentError, match=r"there is no kind `topk`: there are top_k, .* Did you mean `top_k`"
    ):
        synth_bench(("topk",), key=KEY, scale=1 / 64)
    with pytest.raises(
        ArgumentError, match="samples=100, held_out=1000000, n_seeds=1, 1 kinds: a batch has 1024"
    ):
        synth_bench(("top_k",), key=KEY, scale=1 / 64, samples=100)


@pytest.mark.slow
def test_synth_bench__every_kind__finds_features_of_a_small_world():
    found = synth_bench(tuple(KINDS), key=KEY, scale=1 / 64, samples=3000 * 1024, held_out=32 * 1024)
    scores = {
        kind: {name: float(getattr(found, name)[i, 0]) for name in SCORES}
        for i, kind in enumerate(found.kinds)
    }
    assert min(of["mcc"] for of in scores.values()) > 0.5, scores
    assert scores["matching_pursuit"]["f1"] == min(of["f1"] for of in scores.values()), scores  # as published
    assert scores["matching_pursuit"]["explained"] == max(of["explained"] for of in scores.values()), scores
    assert all(abs(of["l0"] - 3) < 0.75 for of in scores.values()), scores


def test_learned__other_choices__reach_the_training():
    world = synth_sae_bench(KEY, scale=1 / 64)
    size = Size.of(world, 1 / 64)
    batches = lambda: (x for x, _ in stream(world, KEY, 2))
    recipe = learned("top_k", batches(), size, steps=2, key=KEY, steps_per_call=2)
    slower = learned("top_k", batches(), size, steps=2, key=KEY, steps_per_call=2, learning_rate=1e-5)
    assert float(jnp.abs(recipe.W_dec - slower.W_dec).max()) > 1e-5
    np.testing.assert_allclose(recipe.decoder_norms(), np.ones(64), **TOL["float32", "parity"])
