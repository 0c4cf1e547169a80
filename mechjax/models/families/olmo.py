"""OLMo 1 (Groeneveld et al. 2024, arXiv:2402.00838), OLMo 2 (arXiv:2501.00656) and OLMo 3 (OLMo Team 2025).

As Llama; OLMo 1 has LayerNorms without parameters and clips queries, keys and values; OLMo 2 and 3 have norms after
attention and MLP alone, and norms over all heads' queries and keys; OLMo 3 has windows on most layers, which do not
share the others' stretched rope.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.layers import layer_types, ropes_by_type, ropes_to_hf, types_to_hf, windows
from mechjax.models.families.llama import BLOCK, CHOICES, CONFIG, DEFAULTS, LLAMA, MODULES, WEIGHTS, to_hf
from mechjax.models.families.rule import Rule

_CONFIG = CONFIG | {"qkv_bias": "attention_bias", "out_bias": "attention_bias"}
_DEFAULTS = DEFAULTS | {"vocab_size": 50304, "rms_norm_eps": 1e-5}


def _to_hf(config: Config) -> dict[str, Any]:
    return to_hf(config) | {"attention_bias": config.qkv_bias}


def _olmo_to_hf(config: Config) -> dict[str, Any]:
    keys = {key: value for key, value in _to_hf(config).items() if key != "rms_norm_eps"}
    return keys | {"clip_qkv": config.qkv_clip}


OLMO = Family(
    name="olmo",
    architectures=("OlmoForCausalLM",),
    model_type="olmo",
    config={ours: theirs for ours, theirs in _CONFIG.items() if ours != "norm_eps"}
    | {"qkv_clip": "clip_qkv"},
    choices=CHOICES | {"norm": "layer", "norm_weight": False, "norm_eps": 1e-5, "mlp_bias": False},
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_olmo_to_hf,
    defaults=_DEFAULTS | {"clip_qkv": None},
    ignored=LLAMA.ignored,
    ignored_weights=LLAMA.ignored_weights,
)

_CHOICES = CHOICES | {"norms": "post", "qk_norm": "joint", "mlp_bias": False}
_WEIGHTS = (
    *(rule for rule in WEIGHTS if "layernorm" not in rule.name),
    Rule(BLOCK + "self_attn.q_norm.weight", ("blocks.attn.q_norm.w",), "(h d) -> h d"),
    Rule(BLOCK + "self_attn.k_norm.weight", ("blocks.attn.k_norm.w",), "(n d) -> n d"),
    Rule(BLOCK + "post_attention_layernorm.weight", ("blocks.ln1_post.w",), "m"),
    Rule(BLOCK + "post_feedforward_layernorm.weight", ("blocks.ln2_post.w",), "m"),
)

OLMO2 = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM",),
    model_type="olmo2",
    config=_CONFIG,
    choices=_CHOICES,
    weights=_WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_to_hf,
    defaults=_DEFAULTS,
    ignored=LLAMA.ignored,
    ignored_weights=LLAMA.ignored_weights,
)


def _types(hf: HfConfig) -> list[str]:
    return layer_types(hf, lambda layer: (layer + 1) % 4 != 0)


def _olmo3_to_hf(config: Config) -> dict[str, Any]:
    plain = {key: value for key, value in _to_hf(config).items() if key not in ("rope_theta", "rope_scaling")}
    return plain | types_to_hf(config) | ropes_to_hf(config)


# transformers takes a base outside `rope_parameters` for the full layers alone.
_ROPES = ropes_by_type(500000.0, 500000.0)
OLMO3 = Family(
    name="olmo3",
    architectures=("Olmo3ForCausalLM",),
    model_type="olmo3",
    config=_CONFIG
    | {
        "rope": lambda hf: _ROPES(hf, _types(hf)),
        "windows": lambda hf: windows(_types(hf), hf["sliding_window"]),
    },
    choices=_CHOICES,
    weights=_WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_olmo3_to_hf,
    defaults=_DEFAULTS | {"rope_theta": None, "sliding_window": 4096, "layer_types": None},
    ignored=LLAMA.ignored,
    ignored_weights=LLAMA.ignored_weights,
)
