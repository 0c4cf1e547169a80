"""The first layers of a model are what they are in the whole of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.models import Config
from mechjax.models.experts import Experts
from mechjax.models.first_layers import first_layers

SMALL = {"d_vocab": 20, "n_ctx": 8, "d_model": 16, "n_layers": 4, "n_heads": 2, "d_head": 8, "d_mlp": 24}
PLAIN = Config(**SMALL)
MIXED = Config(
    **SMALL, mlp="gated", windows=(3, None, 3, None),
    experts=Experts(n_experts=4, top_k=2, d_expert=8, layers=(1, 2)),
)  # fmt: skip


@pytest.mark.parametrize("config", [PLAIN, MIXED], ids=["plain", "mixed"])
def test_first_layers__sites__are_those_of_the_whole_model_to_the_bit(config):
    model = mj.init(config, key=jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    _, whole = mj.capture(model, ["resid_post", "z"])(tokens)
    for n in (1, 3):
        _, found = mj.capture(first_layers(model, n), ["resid_post", "z"])(tokens)
        for site in ("resid_post", "z"):
            np.testing.assert_array_equal(found[site], whole[site][:n])
    assert first_layers(model, 4) is model


def test_first_layers__of_none_or_too_many__is_refused():
    model = mj.init(PLAIN, key=jax.random.key(0))
    for n in (0, 5):
        with pytest.raises(ArgumentError, match=rf"first_layers\(model, {n}\): the model has 4 blocks"):
            first_layers(model, n)
