"""Gemma 1 (arXiv:2403.08295), 2 (arXiv:2408.00118) and 3, text only (arXiv:2503.19786; Gemma Team 2024, 2025).

As Llama, with scales of norms stored less one, embeddings times `sqrt(d_model)`, and a GELU in the gate. Gemma 2 and 3
have norms after attention and MLP too, and windows on most layers; Gemma 2 soft-caps; Gemma 3 has norms on queries and
keys, and another rope where it has windows.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.layers import layer_types, ropes_by_type, ropes_to_hf, types_to_hf, windows
from mechjax.models.families.llama import BLOCK, CHOICES, CONFIG, DEFAULTS, LLAMA, MODULES, WEIGHTS, to_hf
from mechjax.models.families.rule import Rule

_CONFIG = CONFIG | {
    "embed_scale": lambda hf: hf["hidden_size"] ** 0.5,
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
}
_CHOICES = CHOICES | {"norm_offset": 1.0, "mlp_bias": False}
_DEFAULTS = DEFAULTS | {"vocab_size": 256000, "head_dim": 256, "tie_word_embeddings": True}
_CAUSAL = {"use_bidirectional_attention": (None, False)}
_IGNORED = LLAMA.ignored | {"cache_implementation"}
_HEIRS = {
    "post_attention_layernorm": "ln1_post",
    "pre_feedforward_layernorm": "ln2",
    "post_feedforward_layernorm": "ln2_post",
}
_WEIGHTS = (
    *(rule for rule in WEIGHTS if "post_attention_layernorm" not in rule.name),
    *(Rule(f"{BLOCK}{theirs}.weight", (f"blocks.{ours}.w",), "m") for theirs, ours in _HEIRS.items()),
)


def _gate(hf: HfConfig) -> str:
    return (
        "gelu_new" if hf["hidden_act"] == "gelu" else activation("hidden_act")(hf)
    )  # as transformers reads it


def _to_hf(config: Config) -> dict[str, Any]:
    act = "gelu_pytorch_tanh" if config.activation == "gelu_new" else config.activation
    return to_hf(config) | {"attention_bias": config.qkv_bias, "hidden_act": act}


GEMMA = Family(
    name="gemma",
    architectures=("GemmaForCausalLM",),
    model_type="gemma",
    config=_CONFIG | {"activation": _gate},
    choices=_CHOICES,
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_to_hf,
    defaults=_DEFAULTS
    | {
        "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 16, "max_position_embeddings": 8192, "hidden_act": "gelu_pytorch_tanh",
    },
    required=_CAUSAL | {"hidden_activation": (None, "gelu_pytorch_tanh")},
    ignored=_IGNORED,
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip


def _types(hf: HfConfig) -> list[str]:
    every = hf["sliding_window_pattern"]
    return layer_types(hf, lambda layer: bool((layer + 1) % every))


def _later_to_hf(config: Config) -> dict[str, Any]:
    keys = _to_hf(config)
    return keys | types_to_hf(config) | {
        "hidden_activation": keys.pop("hidden_act"), "query_pre_attn_scalar": _inverse_square(config.attn_scale),
        "attn_logit_softcapping": config.attn_softcap, "final_logit_softcapping": config.final_softcap,
    }  # fmt: skip


def _inverse_square(scale: float) -> float | int:
    """The whole number that was made into `scale`, or the nearest number to it."""
    value = scale**-2
    return round(value) if round(value) ** -0.5 == scale else value


_LATER = _CONFIG | {
    "activation": activation("hidden_activation"),
    "attn_scale": lambda hf: hf["query_pre_attn_scalar"] ** -0.5,
    "windows": lambda hf: windows(_types(hf), hf["sliding_window"]),
    "final_softcap": "final_logit_softcapping",
}
_LATER_DEFAULTS = _DEFAULTS | {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 8192, "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256, "sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 2,
    "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
}  # fmt: skip

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    config=_LATER | {"attn_softcap": "attn_logit_softcapping"},
    choices=_CHOICES | {"norms": "both"},
    weights=_WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_later_to_hf,
    defaults=_LATER_DEFAULTS,
    required=_CAUSAL | {"sliding_window_pattern": (2,)},
    ignored=_IGNORED | {"hidden_act"},
    ignored_weights=LLAMA.ignored_weights,
)


def _gemma3_to_hf(config: Config) -> dict[str, Any]:
    plain = {
        key: value for key, value in _later_to_hf(config).items() if key not in ("rope_theta", "rope_scaling")
    }
    return plain | ropes_to_hf(config)


_ROPES = ropes_by_type(1000000.0, lambda hf: hf["rope_local_base_freq"])
GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_type="gemma3_text",
    config=_LATER | {"rope": lambda hf: _ROPES(hf, _types(hf))},
    choices=_CHOICES | {"norms": "both", "qk_norm": "shared"},
    weights=(
        *_WEIGHTS,
        Rule(BLOCK + "self_attn.q_norm.weight", ("blocks.attn.q_norm.w",), "d"),
        Rule(BLOCK + "self_attn.k_norm.weight", ("blocks.attn.k_norm.w",), "d"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_gemma3_to_hf,
    defaults=_LATER_DEFAULTS
    | {
        "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": None, "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6, "final_logit_softcapping": None,
    },
    required=_CAUSAL | {"attn_logit_softcapping": (None,)},  # transformers reads it and does not apply it
    ignored=_IGNORED | {"hidden_act", "_sliding_window_pattern"},
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip
