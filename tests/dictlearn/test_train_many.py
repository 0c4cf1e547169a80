"""Many dictionaries in one program: each learns as it would alone."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dictlearn import train, train_many
from tests.dictionaries.kinds import KINDS, B, D, drawn, tokens
from tests.tolerances import TOL

SGD = optax.sgd(0.02)  # Adam makes much of the rounding of gradients near 0
KEY = jax.random.key(0)
GIVEN = {"steps": 4, "learning_rate": 1.0, "optimizer": SGD, "steps_per_call": 2, "dead_after": 50}


@pytest.mark.parametrize(
    "name",
    [name if name == "jump_relu" else pytest.param(name, marks=pytest.mark.slow) for name in KINDS],
)
@pytest.mark.parametrize(
    "own", [pytest.param(False, marks=pytest.mark.slow), True], ids=["shared", "own batches"]
)
def test_train_many__of_any_kind__is_each_alone(name, own):
    some = [drawn(name, seed) for seed in range(3)]
    streams = [[tokens(10 * own * i + step) for step in range(4)] for i in range(3)]
    batches = [jnp.stack(xs) for xs in zip(*streams, strict=True)] if own else streams[0]
    many = train_many(some, batches, own_batches=own, **GIVEN)
    for dictionary, stream, found in zip(some, streams, many, strict=True):
        alone = train(dictionary, stream, key=KEY, **GIVEN)
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one, two, **TOL["float32", "gradient"])


@pytest.mark.parametrize("name", ["batch_top_k", pytest.param("relu", marks=pytest.mark.slow)])
def test_train_many__mapped_as_on_an_accelerator__is_each_alone(name, monkeypatch):
    monkeypatch.setattr(importlib.import_module("mechjax.dictlearn.train_many"), "ONE_BY_ONE", ())
    some, given = [drawn(name, seed) for seed in range(3)], [tokens(step) for step in range(4)]
    for dictionary, found in zip(some, train_many(some, given, **GIVEN), strict=True):
        alone = train(dictionary, given, key=KEY, **GIVEN)
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one, two, **TOL["float32", "gradient"])


def test_train_many__of_kinds_and_sizes_that_differ__is_each_alone_and_tells_of_all(tmp_path):
    some = [drawn("top_k", 0), drawn("relu", 1), drawn("top_k", 2)]
    given = [tokens(step) for step in range(4)]
    many = train_many(some, given, metrics=tmp_path / "told.jsonl", **GIVEN)
    for dictionary, found in zip(some, many, strict=True):
        alone = train(dictionary, given, key=KEY, **GIVEN)
        assert type(found.dictionary) is type(dictionary)
        np.testing.assert_allclose(
            found.dictionary.W_dec, alone.dictionary.W_dec, **TOL["float32", "gradient"]
        )
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [line["step"] for line in told] == [1, 2, 3, 4]
    assert told[2]["loss"] == pytest.approx([float(found.history["loss"][2]) for found in many])
    assert told[2]["aux"][1] is None and told[2]["aux"][0] is not None


def test_train_many__of_transcoders__reads_pairs():
    some = [drawn("top_k", seed, d_out=7) for seed in range(2)]
    pairs = [(tokens(i), tokens(i, d=7)) for i in range(4)]
    many = train_many(some, pairs, **GIVEN)
    alone = train(some[1], pairs, key=KEY, **GIVEN)
    np.testing.assert_allclose(many[1].history["loss"], alone.history["loss"], **TOL["float32", "gradient"])


def test_train_many__of_what_differs__says_what_must_not():
    with pytest.raises(
        ArgumentError, match=r"2 dictionaries that read and write \(12,\) to \(12,\), \(12,\) to \(7,\)"
    ):
        train_many([drawn("top_k"), drawn("top_k", d_out=7)], [tokens()] * 4, **GIVEN)
    with pytest.raises(ArgumentError, match="0 dictionaries that read and write nothing"):
        train_many([], [tokens()] * 4, **GIVEN)
    with pytest.raises(ShapeError, match=r"shape \(24, 12\), and \(2, None, 12\)|\(24, 12\)"):
        train_many([drawn("top_k"), drawn("top_k", 1)], [tokens()] * 4, own_batches=True, **GIVEN)
    with pytest.raises(ArgumentError, match="batch of step 1 holds numbers that are not finite"):
        train_many([drawn("top_k")] * 2, [jnp.full((B, D), jnp.nan)] * 4, **GIVEN)
