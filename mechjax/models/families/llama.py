"""Llama (Touvron et al. 2023, arXiv:2302.13971) and Mistral (Jiang et al. 2023, arXiv:2310.06825).

RMSNorm, rotary positions in halves, serial residual, gated MLP, grouped keys; Mistral with a window on every layer.
"""

from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation, rotation
from mechjax.models.families.rule import Rule

_BLOCK = "model.layers.{}."


def _rotary_base(hf: HfConfig) -> float:
    base, part = rotation(hf, theta_key="rope_theta", part_key="partial_rotary_factor", part_default=1.0)
    if part != 1.0:
        raise UnsupportedModelError(
            f"The config has `partial_rotary_factor` = {part}: transformers' own {hf.family} ignores it, so what is "
            "meant is unclear; only 1.0 is accepted."
        )
    return base


def _windows(hf: HfConfig) -> tuple[int, ...] | None:
    window = hf["sliding_window"]
    return None if window is None else (window,) * hf.count("num_hidden_layers")


_CONFIG = {
    "d_vocab": "vocab_size",
    "n_ctx": "max_position_embeddings",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "d_head": "head_dim",
    "d_mlp": "intermediate_size",
    "activation": activation("hidden_act"),
    "norm_eps": "rms_norm_eps",
    "rotary_base": _rotary_base,
    "tied": "tie_word_embeddings",
}
_CHOICES = {"norm": "rms", "positions": "rotary", "residual": "serial", "mlp": "gated"}
_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": None,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_parameters": None, "rope_scaling": None,
    "partial_rotary_factor": None, "tie_word_embeddings": False,
}  # fmt: skip
_WEIGHTS = (
    Rule("model.embed_tokens.weight", ("W_E",), "v m"),
    Rule(_BLOCK + "input_layernorm.weight", ("blocks.ln1.w",), "m"),
    Rule(_BLOCK + "self_attn.q_proj.weight", ("blocks.attn.W_Q",), "(h d) m -> m h d"),
    Rule(_BLOCK + "self_attn.k_proj.weight", ("blocks.attn.W_K",), "(n d) m -> m n d"),
    Rule(_BLOCK + "self_attn.v_proj.weight", ("blocks.attn.W_V",), "(n d) m -> m n d"),
    Rule(_BLOCK + "self_attn.o_proj.weight", ("blocks.attn.W_O",), "m (h d) -> h d m"),
    Rule(_BLOCK + "self_attn.q_proj.bias", ("blocks.attn.b_Q",), "(h d) -> h d"),
    Rule(_BLOCK + "self_attn.k_proj.bias", ("blocks.attn.b_K",), "(n d) -> n d"),
    Rule(_BLOCK + "self_attn.v_proj.bias", ("blocks.attn.b_V",), "(n d) -> n d"),
    Rule(_BLOCK + "self_attn.o_proj.bias", ("blocks.attn.b_O",), "m"),
    Rule(_BLOCK + "post_attention_layernorm.weight", ("blocks.ln2.w",), "m"),
    Rule(_BLOCK + "mlp.up_proj.weight", ("blocks.mlp.W_in",), "f m -> m f"),
    Rule(_BLOCK + "mlp.gate_proj.weight", ("blocks.mlp.W_gate",), "f m -> m f"),
    Rule(_BLOCK + "mlp.down_proj.weight", ("blocks.mlp.W_out",), "m f -> f m"),
    Rule(_BLOCK + "mlp.up_proj.bias", ("blocks.mlp.b_in",), "f"),
    Rule(_BLOCK + "mlp.gate_proj.bias", ("blocks.mlp.b_gate",), "f"),
    Rule(_BLOCK + "mlp.down_proj.bias", ("blocks.mlp.b_out",), "m"),
    Rule("model.norm.weight", ("ln_final.w",), "m"),
    Rule("lm_head.weight", ("W_U",), "v m -> m v"),
)


def _shared_to_hf(config: Config) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.d_head, "intermediate_size": config.d_mlp,
        "hidden_act": config.activation, "rms_norm_eps": config.norm_eps, "rope_theta": config.rotary_base,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip


def _llama_to_hf(config: Config) -> dict[str, Any]:
    return _shared_to_hf(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral_to_hf(config: Config) -> dict[str, Any]:
    return _shared_to_hf(config) | {"sliding_window": config.windows[0] if config.windows else None}


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    config=_CONFIG | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    choices=_CHOICES,
    weights=_WEIGHTS,
    prefix="model.",
    to_hf=_llama_to_hf,
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 2048, "intermediate_size": 11008, "num_key_value_heads": None,
        "attention_bias": False, "mlp_bias": False,
    },
    ignored=frozenset(["attention_dropout"]),
    ignored_weights=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)  # fmt: skip

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    config=_CONFIG
    | {"windows": _windows},
    choices=_CHOICES | {"qkv_bias": False, "out_bias": False, "mlp_bias": False},
    weights=_WEIGHTS,
    prefix="model.",
    to_hf=_mistral_to_hf,
    defaults=_DEFAULTS
    | {
        "max_position_embeddings": 131072, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    ignored=frozenset(["attention_dropout"]),
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip
