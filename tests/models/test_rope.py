"""Stretched frequencies against closed forms; parity with transformers is in `tests/parity`."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.base.errors import ArgumentError
from mechjax.models import Config, init
from mechjax.models.positions import alibi_slopes, angles
from mechjax.models.rope import Banded, Linear, LongRope, Rope, Yarn
from tests.tolerances import TOL

CLOSE = TOL["float32", "law"]
PLAIN = Rope(base=100.0).frequencies(8)


def test_frequencies__plain__are_powers_of_the_base():
    assert_allclose(PLAIN, 100.0 ** (-np.arange(4) / 4), **CLOSE)


def test_stretches__ends_of_their_ramps__are_whole_and_kept():
    assert_allclose(Rope(base=100.0, stretch=Linear(factor=4)).frequencies(8), PLAIN / 4, **CLOSE)
    banded = Banded(factor=4, low=1, high=4, trained=32)
    turns = 32 * PLAIN / (2 * math.pi)
    found = Rope(base=100.0, stretch=banded).frequencies(8)
    assert turns[0] > 4 > turns[1] > 1 > turns[3]
    assert_allclose(found[[0, 3]], [PLAIN[0], PLAIN[3] / 4], **CLOSE)
    assert PLAIN[1] / 4 < found[1] < PLAIN[1]
    yarn = Yarn(factor=4, trained=64, fast=4, slow=0.25)
    found = Rope(base=100.0, stretch=yarn).frequencies(8)
    assert_allclose(found[[0]], PLAIN[[0]], **CLOSE)
    assert (found[1:] < PLAIN[1:]).all()
    assert (found >= PLAIN / 4 * (1 - 1e-6)).all()


def test_longrope__longer_sequences__use_the_other_divisors_example_by_example():
    rope = Rope(stretch=LongRope(short=(1, 2), long=(3, 4), trained=4, amplitude=1.5))
    cos, _ = angles(rope, 4, jnp.array([[0, 1, 2, 3], [0, 1, 2, 4]]))
    for row, divisors in enumerate(([1, 2], [3, 4])):
        assert_allclose(cos[row, 1], 1.5 * np.cos(Rope().frequencies(4) / divisors), **CLOSE)


def test_alibi_slopes__powers_of_two_and_others__are_the_papers():
    assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), **CLOSE)
    assert_allclose(alibi_slopes(3), [2**-4, 2**-8, 2**-2], **CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope": Rope(base=0.0)}, r"`base` = 0.0 of Rope must be a positive"),
        ({"rope": 5.0}, r"`rope` = 5.0 must be a Rope, or have one entry for each of the 2 layers"),
        ({"rope": (Rope(),)}, r"must be a Rope, or have one entry for each of the 2 layers"),
        ({"rope": Rope(stretch="linear")}, r"`stretch` = 'linear' of Rope must be a Stretch"),
        (
            {"rope": Rope(stretch=LongRope(short=(1.0,), long=(1.0,), trained=4))},
            r"`short` of LongRope has 1 divisors; 6 dimensions rotate, so 3 are needed",
        ),
    ],
)
def test_config__ropes_that_cannot_be__are_refused(change, message):
    with pytest.raises(ArgumentError, match=message):
        Config(d_vocab=11, n_ctx=8, d_model=12, n_layers=2, n_heads=2, positions="rotary", **change)


def test_stretch__numbers_that_cannot_be__are_refused():
    with pytest.raises(ArgumentError, match=r"`factor` = 0 of Linear must be a positive, finite number"):
        Linear(factor=0)


def test_rope__one_per_layer_all_alike__is_one_for_all(tiny_tokens):
    config = Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=2, n_heads=2, positions="rotary")
    model = init(config, key=jax.random.key(0))
    same = init(replace(config, rope=(Rope(), Rope())), key=jax.random.key(0))
    assert_allclose(same(tiny_tokens), model(tiny_tokens), **TOL["any", "exact"])
