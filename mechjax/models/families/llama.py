"""Llama (Touvron et al. 2023, arXiv:2302.13971), Mistral (Jiang et al. 2023, arXiv:2310.06825) and Granite (IBM 2024).

RMSNorm, rotary positions in halves, serial residual, gated MLP, grouped keys. Mistral has a window on every layer;
Granite has factors on embeddings, on what is written to the residual stream, on scores and on logits. Many other
families begin from the tables here.
"""

from math import inf, nextafter
from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.layers import SLIDING, windows
from mechjax.models.families.rotary import ROTARY_DEFAULTS, rope_to_hf, whole_rotation
from mechjax.models.families.rule import Rule

BLOCK = "model.layers.{}."
MODULES = {
    BLOCK + "self_attn": (None, "attn_out"),
    BLOCK + "mlp": (None, "mlp_out"),
    "lm_head": (None, "logits"),
}
CONFIG = {
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
    "rope": whole_rotation,
    "tied": "tie_word_embeddings",
}
"""Our fields, by the keys that Llama-like configs share."""
CHOICES = {"norm": "rms", "positions": "rotary", "residual": "serial", "mlp": "gated"}
NO_BIASES = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
DEFAULTS = ROTARY_DEFAULTS | {
    "vocab_size": 32000, "max_position_embeddings": 2048, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "mlp_bias": False,
}  # fmt: skip
"""transformers' values of what a Llama config may leave out."""
WEIGHTS = (
    Rule("model.embed_tokens.weight", ("W_E",), "v m"),
    Rule(BLOCK + "input_layernorm.weight", ("blocks.ln1.w",), "m"),
    Rule(BLOCK + "self_attn.q_proj.weight", ("blocks.attn.W_Q",), "(h d) m -> m h d"),
    Rule(BLOCK + "self_attn.k_proj.weight", ("blocks.attn.W_K",), "(n d) m -> m n d"),
    Rule(BLOCK + "self_attn.v_proj.weight", ("blocks.attn.W_V",), "(n d) m -> m n d"),
    Rule(BLOCK + "self_attn.o_proj.weight", ("blocks.attn.W_O",), "m (h d) -> h d m"),
    Rule(BLOCK + "self_attn.q_proj.bias", ("blocks.attn.b_Q",), "(h d) -> h d"),
    Rule(BLOCK + "self_attn.k_proj.bias", ("blocks.attn.b_K",), "(n d) -> n d"),
    Rule(BLOCK + "self_attn.v_proj.bias", ("blocks.attn.b_V",), "(n d) -> n d"),
    Rule(BLOCK + "self_attn.o_proj.bias", ("blocks.attn.b_O",), "m"),
    Rule(BLOCK + "post_attention_layernorm.weight", ("blocks.ln2.w",), "m"),
    Rule(BLOCK + "mlp.up_proj.weight", ("blocks.mlp.W_in",), "f m -> m f"),
    Rule(BLOCK + "mlp.gate_proj.weight", ("blocks.mlp.W_gate",), "f m -> m f"),
    Rule(BLOCK + "mlp.down_proj.weight", ("blocks.mlp.W_out",), "m f -> f m"),
    Rule(BLOCK + "mlp.up_proj.bias", ("blocks.mlp.b_in",), "f"),
    Rule(BLOCK + "mlp.gate_proj.bias", ("blocks.mlp.b_gate",), "f"),
    Rule(BLOCK + "mlp.down_proj.bias", ("blocks.mlp.b_out",), "m"),
    Rule("model.norm.weight", ("ln_final.w",), "m"),
    Rule("lm_head.weight", ("W_U",), "v m -> m v"),
)
"""The tensors of Llama, biases included."""


def to_hf(config: Config) -> dict[str, Any]:
    """The keys that Llama-like configs share."""
    return rope_to_hf(config.rope) | {
        "vocab_size": config.d_vocab, "max_position_embeddings": config.n_ctx, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads, "head_dim": config.d_head, "intermediate_size": config.d_mlp,
        "hidden_act": config.activation, "rms_norm_eps": config.norm_eps, "tie_word_embeddings": config.tied,
    }  # fmt: skip


def mistral_windows(hf: HfConfig) -> tuple[Any, ...] | None:
    """One window on every layer, where there is one."""
    return windows([SLIDING] * hf.count("num_hidden_layers"), hf["sliding_window"])


def _llama_to_hf(config: Config) -> dict[str, Any]:
    return to_hf(config) | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral_to_hf(config: Config) -> dict[str, Any]:
    return to_hf(config) | {"sliding_window": config.windows[0] if config.windows else None}


def _granite_to_hf(config: Config) -> dict[str, Any]:
    divisor = 1 / config.logit_scale
    near = (divisor, nextafter(divisor, 0), nextafter(divisor, inf))
    return to_hf(config) | {
        "attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias, "embedding_multiplier": config.embed_scale,
        "residual_multiplier": config.residual_scale, "attention_multiplier": config.attn_scale,
        "logits_scaling": next((d for d in near if 1 / d == config.logit_scale), divisor),
    }  # fmt: skip


LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    config=CONFIG | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    choices=CHOICES,
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_llama_to_hf,
    defaults=DEFAULTS,
    ignored=frozenset(["attention_dropout"]),
    ignored_weights=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_type="mistral",
    config=CONFIG | {"windows": mistral_windows},
    choices=CHOICES | NO_BIASES,
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_mistral_to_hf,
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 131072, "intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
    },
    ignored=frozenset(["attention_dropout"]),
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip

GRANITE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    model_type="granite",
    config={
        **LLAMA.config,
        "embed_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attn_scale": "attention_multiplier",
        "logit_scale": lambda hf: 1 / hf["logits_scaling"],
    },
    choices=CHOICES,
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_granite_to_hf,
    defaults=DEFAULTS
    | {
        "embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0, "logits_scaling": 1.0,
    },
    ignored=frozenset(["attention_dropout"]),
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip
