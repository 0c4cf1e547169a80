from dataclasses import FrozenInstanceError

import jax
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.models import Config, init, parameters

SMALL = {"d_vocab": 11, "n_ctx": 8, "d_model": 12, "n_layers": 2, "n_heads": 4}


def test_config__left_out_sizes__follow_from_the_others():
    config = Config(**SMALL)
    assert (config.n_kv_heads, config.d_head, config.d_mlp, config.rotary_dim) == (4, 3, 48, 3)
    assert (config.attn_scale, config.norm_bias) == (3**-0.5, True)
    assert not Config(**SMALL, norm="rms").norm_bias
    assert hash(config) == hash(Config(**SMALL))
    assert Config(**SMALL, windows=[2, None]).windows == (2, None)
    with pytest.raises(FrozenInstanceError):
        config.d_model = 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": -1}, r"`d_model` = -1 must be a whole number from 1"),
        ({"n_layers": 0}, r"`n_layers` = 0 must be a whole number"),
        ({"n_layers": 10**9}, r"`n_layers` = 1000000000 must be a whole number from 1 to 65,536"),
        ({"d_vocab": 2.5}, r"`d_vocab` = 2.5 must be a whole number"),
        ({"n_ctx": True}, r"`n_ctx` = True must be a whole number"),
        ({"d_mlp": "64"}, r"`d_mlp` = '64' must be a whole number"),
        ({"d_model": 13}, r"`d_model` = 13 is no multiple of `n_heads` = 4"),
        ({"n_kv_heads": 3}, r"`n_heads` = 4 is no multiple of `n_kv_heads` = 3"),
        ({"positions": "rotary"}, r"`rotary_dim` = 3 must be even and at most `d_head` = 3"),
        ({"positions": "rotary", "rotary_dim": 4}, r"`rotary_dim` = 4 must be even and at most `d_head` = 3"),
        ({"norm": "batch"}, r"`norm` = 'batch' is not one of 'layer', 'rms'"),
        ({"residual": ["serial"]}, r"`residual` = \['serial'\] is not one of"),
        ({"tied": "yes"}, r"`tied` = 'yes' must be True or False"),
        ({"norm_eps": 0.0}, r"`norm_eps` = 0.0 must be a positive, finite number"),
        ({"attn_scale": float("inf")}, r"`attn_scale` = inf must be a positive, finite number"),
        ({"attn_softcap": -3.0}, r"`attn_softcap` = -3.0 must be a positive"),
        ({"windows": (3,)}, r"`windows` = \(3,\) must have one entry for each of the 2 layers"),
        ({"windows": (3, 0)}, r"`windows` = 0 must be a whole number"),
        (
            {"causal": False, "windows": (3, None)},
            r"`windows` = \(3, None\) counts positions back .* `causal` = False",
        ),
        ({"causal": False, "positions": "alibi"}, r"`positions` = 'alibi' counts positions back"),
        ({"norms": "none", "residual": "parallel_shared"}, r"shares a norm .* `norms` = 'none' goes with"),
        (
            {"d_vocab": 2**30, "d_model": 2**20},
            r"1,1\d\d,.* parameters is refused: at most 1,099,511,627,776",
        ),
    ],
)
def test_config__absurd_numbers__are_refused_by_name(change, message):
    with pytest.raises(ArgumentError, match=message):
        Config(**SMALL | change)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {
            "norm": "rms",
            "positions": "rotary",
            "rotary_dim": 2,
            "mlp": "gated",
            "tied": False,
            "n_kv_heads": 2,
        },
        {"mlp": "none", "norm": "layer"},
        {"norms": "none"},
        {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "unembed_bias": True, "positions": "none"},
    ],
)
def test_shapes__every_choice__are_those_of_a_fresh_model(choices):
    config = Config(**SMALL | choices)
    params = parameters(init(config, key=jax.random.key(0)))
    assert {path: array.shape for path, array in params.items()} == config.shapes
    assert sum(array.size for array in params.values()) == config.n_params
