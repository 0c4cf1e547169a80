"""Pairs inside jit: ids are data there, and masks may be known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import PairingError
from mechjax.base.prompts import Prompts
from mechjax.tasks.pairing import paired

IDS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


@pytest.mark.parametrize("known", [True, False])
def test_paired__inside_jit__is_both_sides(tiny_config, known):
    mask = jnp.array([[True, True, False], [True, True, True]])

    @jax.jit
    def both(ids, traced):
        own = mask if known else traced
        (one, here), (other, there) = paired(Prompts(ids, own), Prompts(ids + 1, own), tiny_config)
        return jnp.where(here & there, one + other, 0)

    np.testing.assert_array_equal(both(IDS, mask), np.where(mask, 2 * IDS + 1, 0))


def test_paired__inside_jit_with_masks_that_differ__is_refused(tiny_config):
    masks = jnp.array([[True, True, False]] * 2), jnp.array([[True] * 3, [True, True, False]])
    run = jax.jit(lambda ids: paired(*(Prompts(ids, mask) for mask in masks), tiny_config)[0][0])
    with pytest.raises(
        PairingError, match=r"(?s)pair 0 has 2 clean and 3 corrupt tokens.*clean:   \? \| \? \| -"
    ):
        run(IDS)
