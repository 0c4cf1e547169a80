"""Qwen2 (Yang et al. 2024, arXiv:2407.10671) and Qwen3 (Yang et al. 2025, arXiv:2505.09388).

As Llama; Qwen2 with biases on queries, keys and values, Qwen3 with a norm on each head's queries and keys. Upper layers
may have windows.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.layers import layer_types, types_to_hf, windows
from mechjax.models.families.llama import BLOCK, CHOICES, CONFIG, DEFAULTS, LLAMA, MODULES, WEIGHTS, to_hf
from mechjax.models.families.rule import Rule

_DEFAULTS = DEFAULTS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip


def upper_windows(hf: HfConfig) -> tuple[Any, ...] | None:
    """Windows from layer `max_window_layers` on, or where `layer_types` says so, if the config uses windows at all."""
    used, window, first = (hf[key] for key in ("use_sliding_window", "sliding_window", "max_window_layers"))
    window = window if used else None
    return windows(layer_types(hf, lambda layer: window is not None and layer >= first), window)


def _to_hf(config: Config) -> dict[str, Any]:
    return to_hf(config) | types_to_hf(config) | {"use_sliding_window": config.windows is not None}


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_type="qwen2",
    config=CONFIG | {"windows": upper_windows},
    choices=CHOICES | {"qkv_bias": True, "out_bias": False, "mlp_bias": False},
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_to_hf,
    defaults=_DEFAULTS,
    ignored=LLAMA.ignored,
    ignored_weights=LLAMA.ignored_weights,
)

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_type="qwen3",
    config=CONFIG | {"windows": upper_windows, "qkv_bias": "attention_bias", "out_bias": "attention_bias"},
    choices=CHOICES | {"mlp_bias": False, "qk_norm": "shared"},
    weights=(
        *WEIGHTS,
        Rule(BLOCK + "self_attn.q_norm.weight", ("blocks.attn.q_norm.w",), "d"),
        Rule(BLOCK + "self_attn.k_norm.weight", ("blocks.attn.k_norm.w",), "d"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=lambda config: _to_hf(config) | {"attention_bias": config.qkv_bias},
    defaults=_DEFAULTS | {"head_dim": 128},
    ignored=LLAMA.ignored,
    ignored_weights=LLAMA.ignored_weights,
)
