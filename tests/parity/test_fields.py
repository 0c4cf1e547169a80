"""Each field of each family's config that changes numbers: one changed value changes transformers' logits, ours equally.

The weights stay as they are (a field that adds or removes some keeps those that both have); what transformers computes
with the changed config is compared with what we compute from that config.
"""

from copy import deepcopy
from dataclasses import replace

import jax
import numpy as np
import pytest

from mechjax.models import assemble, parameters
from mechjax.models.families import config_from_hf
from tests.parity import test_experts
from tests.parity.cases import CASES, Pair, attention_of, pair
from tests.parity.test_parity import assert_close

torch = pytest.importorskip("torch", reason="parity needs PyTorch")

_THETA = {"rope_type": "default", "rope_theta": 7.0}
_FULL, _LOCAL = "full_attention", "sliding_attention"
FIELDS = {
    "gpt2": {"activation_function": "relu", "layer_norm_epsilon": 0.3, "scale_attn_weights": False},
    "pythia": {"layer_norm_eps": 0.3, "hidden_act": "silu"},
    "llama_gqa": {"rope_parameters": _THETA, "rms_norm_eps": 0.3, "hidden_act": "gelu"},
    "llama_linear": {"rope_parameters": {"rope_type": "linear", "factor": 9.0, "rope_theta": 50.0}},
    "mistral": {"sliding_window": 2, "rms_norm_eps": 0.3},
    "granite": {
        "embedding_multiplier": 2.0, "residual_multiplier": 0.3, "attention_multiplier": 0.9, "logits_scaling": 5.0,
    },
    "qwen2": {"max_window_layers": 0, "sliding_window": 2, "use_sliding_window": False},
    "qwen3": {"rope_parameters": _THETA, "rms_norm_eps": 0.3},
    "gemma": {"hidden_act": "silu", "rms_norm_eps": 0.3, "rope_parameters": _THETA},
    "gemma_2": {
        "query_pre_attn_scalar": 50, "sliding_window": 2, "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 1.0, "layer_types": [_FULL, _LOCAL], "hidden_activation": "silu",
    },
    "gemma_3": {
        "query_pre_attn_scalar": 50, "sliding_window": 2, "layer_types": [_FULL, _LOCAL],
        "final_logit_softcapping": 1.0, "rope_parameters": {_FULL: _THETA, _LOCAL: _THETA},
    },
    "gpt_neo": {"window_size": 2, "attention_types": [[["local"], 2]], "layer_norm_epsilon": 0.3},
    "gpt_j": {"rotary_dim": 8, "layer_norm_epsilon": 0.3, "activation_function": "silu"},
    "phi": {"qk_layernorm": False, "layer_norm_eps": 0.3, "hidden_act": "relu"},
    "phi_2": {"partial_rotary_factor": 1.0, "rope_parameters": _THETA | {"partial_rotary_factor": 0.7}},
    "phi_3": {"sliding_window": 2, "rms_norm_eps": 0.3, "rope_parameters": _THETA},
    "olmo": {"clip_qkv": 0.2, "rope_parameters": _THETA},
    "olmo_2": {"rms_norm_eps": 0.3, "rope_parameters": _THETA},
    "olmo_3": {"sliding_window": 2, "layer_types": [_FULL, _LOCAL], "rope_parameters": {_FULL: _THETA, _LOCAL: _THETA}},
    "stablelm": {"partial_rotary_factor": 1.0, "layer_norm_eps": 0.3, "use_qkv_bias": False},
    "stablelm_parallel": {"qk_layernorm": False},
    "cohere": {"logit_scale": 1.0, "use_qk_norm": False, "layer_norm_eps": 0.3},
    "cohere_2": {"logit_scale": 1.0, "sliding_window": 2, "layer_types": [_FULL, _LOCAL], "rope_parameters": _THETA},
    "falcon_7b": {"layer_norm_epsilon": 0.3, "rope_parameters": _THETA, "activation": "relu"},
    "falcon_rw": {"alibi": False, "bias": False},
    "bloom": {"layer_norm_epsilon": 0.3},
    "opt": {"activation_function": "gelu", "enable_bias": False},
}  # fmt: skip
"""Case -> key of its config -> another value."""
EXPERTS = {
    "mixtral": {"num_experts_per_tok": 3, "sliding_window": 2, "rms_norm_eps": 0.3, "hidden_act": "gelu"},
    "qwen3_moe": {"norm_topk_prob": False, "num_experts_per_tok": 1, "rope_parameters": _THETA},
    "olmoe": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "gpt_oss": {
        "sliding_window": 2, "num_experts_per_tok": 3, "rms_norm_eps": 0.3, "layer_types": [_FULL, _FULL, _LOCAL],
    },
    "deepseek_v2": {
        "routed_scaling_factor": 0.4, "topk_group": 1, "num_experts_per_tok": 1, "rope_parameters": _THETA,
    },
    "deepseek_v3": {
        "norm_topk_prob": False, "routed_scaling_factor": 0.4, "topk_group": 1, "num_experts_per_tok": 1,
        "rope_interleave": False, "rope_parameters": _THETA,
    },
}  # fmt: skip
"""The same of families with experts."""
_SPELLED_OUT = {
    "max_window_layers": "layer_types", "use_sliding_window": "layer_types", "attention_types": "attention_layers",
}  # fmt: skip
"""Key -> the key that says the same layer by layer, and would win."""


def with_field(case: Pair, name: str, key: str, value: object) -> Pair:
    """The same weights under a config with one other value, on both sides."""
    given = case.hf.config.to_dict() | deepcopy({key: value})
    if key in _SPELLED_OUT:
        del given[_SPELLED_OUT[key]]
    if key == "partial_rotary_factor":
        given["rope_parameters"] = given["rope_parameters"] | {key: value}
    config = type(case.hf.config)(
        **{k: v for k, v in given.items() if k not in ("transformers_version", "model_type")}
    )
    config._attn_implementation = attention_of(name) if key != "alibi" and name in CASES else "eager"
    config._experts_implementation = "eager"
    hf = type(case.hf)(config).eval()
    hf.load_state_dict(case.hf.state_dict(), strict=False)
    ours, _ = config_from_hf(config.to_dict() | {"architectures": [type(hf).__name__]})
    kept = {path: array for path, array in parameters(case.model).items() if path in ours.shapes}
    return replace(case, hf=hf, model=assemble(ours, kept))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param(name, key, marks=() if first == 0 and name in FIELDS else pytest.mark.slow)
        for name, fields in (FIELDS | EXPERTS).items()
        for first, key in enumerate(fields)
    ],
)
def test_field__changed__changes_transformers_and_ours_equally(name, key):
    case = pair(name) if name in FIELDS else Pair(*test_experts.pair(name), test_experts.TOKENS)
    changed = with_field(case, name, key, (FIELDS | EXPERTS)[name][key])
    theirs = changed.hf_logits()
    assert np.abs(theirs - case.hf_logits()).max() > 1e-3
    with jax.disable_jit():  # tiny, and run once
        assert_close(changed.model(case.tokens), theirs)


def test_fields__every_family_of_the_cases__has_some():
    kinds = {kind for kind, _ in CASES.values()}
    assert {CASES[name][0] for name in FIELDS} == kinds
    assert EXPERTS.keys() == test_experts.CASES.keys()
