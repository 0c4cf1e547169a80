"""Checksums of pytrees: the same for the same, another for any difference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.digests import arrays_digest, tree_digest


def test_digests__of_equal_models__are_equal(tiny_config):
    one, two = (mj.init(tiny_config, key=jax.random.key(0)) for _ in range(2))
    assert arrays_digest(one) == arrays_digest(two) and tree_digest(one) == tree_digest(two)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": jnp.arange(6.0).at[2].set(9), "b": jnp.ones(2, jnp.int32), "n": 3, "s": "x"},
        {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(2, jnp.int32), "n": 3, "s": "x"},
        {"a": jnp.arange(6.0), "b": jnp.ones(2, jnp.uint32), "n": 3, "s": "x"},
        {"a": jnp.arange(6.0), "c": jnp.ones(2, jnp.int32), "n": 3, "s": "x"},
    ],
)
def test_digests__of_other_arrays__differ(changed):
    given = {"a": jnp.arange(6.0), "b": jnp.ones(2, jnp.int32), "n": 3, "s": "x"}
    assert arrays_digest(given) != arrays_digest(changed)
    assert tree_digest(given) != tree_digest(changed)


@pytest.mark.parametrize("changed", [{"n": 4}, {"s": "y"}, {"m": None}])
def test_digests__of_what_is_no_array__count_in_that_of_the_tree_alone(changed):
    given = {"a": jnp.arange(6.0), "n": 3, "s": "x"}
    assert arrays_digest(given) == arrays_digest(given | changed)
    assert tree_digest(given) != tree_digest(given | changed)


def test_tree_digest__of_a_models_choice__differs_where_arrays_do_not(tiny_config):
    given = mj.init(tiny_config, key=jax.random.key(0))
    other = mj.init(dataclasses.replace(tiny_config, norm_eps=1e-6), key=jax.random.key(0))
    assert arrays_digest(given) == arrays_digest(other)
    assert tree_digest(given) != tree_digest(other)


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_digests__of_a_long_array_that_differs_in_its_middle__differ(kind):
    """Printed, the two are the same."""
    one, two = np.zeros(5000, np.float32), np.zeros(5000, np.float32)
    two[2500] = 1
    assert repr(one) == repr(two)
    assert arrays_digest({"a": kind(one)}) != arrays_digest({"a": kind(two)})
    assert tree_digest({"a": kind(one)}) != tree_digest({"a": kind(two)})
    assert tree_digest({"a": kind(one)}) == tree_digest({"a": kind(one.copy())})
