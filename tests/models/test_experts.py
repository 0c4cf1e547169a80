import re

import pytest

from mechjax.base.errors import ArgumentError
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent

EXPERTS = {"n_experts": 8, "top_k": 2, "d_expert": 4}
LATENT = {"q_rank": 4, "kv_rank": 4, "d_nope": 4, "d_rope": 2, "d_value": 4}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top_k": 0}, "`top_k` = 0 must be a whole number from 1"),
        ({"d_shared": -1}, "`d_shared` = -1 must be a whole number from 1"),
        ({"scale": float("nan")}, "`scale` = nan must be a positive, finite number"),
        ({"swiglu_limit": 0.0}, "`swiglu_limit` = 0.0 must be a positive"),
        ({"scoring": "tanh"}, "`scoring` = 'tanh' is not one of 'softmax', 'sigmoid', 'softmax_chosen'"),
        ({"normalized": 1}, "`normalized` = 1 must be True or False"),
        ({"n_groups": 3}, "`n_experts` = 8 experts cannot be routed by `top_groups` = 1 of `n_groups` = 3"),
        ({"top_groups": 2}, "cannot be routed by `top_groups` = 2 of `n_groups` = 1"),
        (
            {"top_k": 9},
            "`top_k` = 9 experts cannot be chosen from `top_groups` = 1 groups of 8: choose fewer",
        ),
        ({"n_groups": 8, "top_groups": 2, "group_score": "top2"}, "needs groups of at least two experts"),
        ({"shared_gate": True}, "`shared_gate` = True gates shared experts, but `d_shared` = 0"),
    ],
)
def test_experts__absurd__are_refused_by_name(given, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Experts(**EXPERTS | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"q_rank": 0}, "`q_rank` = 0 must be a whole number"),
        ({"kv_rank": None}, "`kv_rank` = None must be a whole number"),
        ({"d_rope": 3}, "`d_rope` = 3 must be even: dimensions rotate two by two"),
        ({"norm_eps": 0}, "`norm_eps` = 0 must be a positive"),
    ],
)
def test_latent__absurd__is_refused_by_name(given, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        Latent(**LATENT | given)
