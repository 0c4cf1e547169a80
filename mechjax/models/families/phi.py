"""Phi-1, 1.5 and 2 (Gunasekar et al. 2023, arXiv:2306.11644) and Phi-3 (Abdin et al. 2024, arXiv:2404.14219).

Phi: LayerNorm, attention and MLP in parallel through one norm, rotary positions on part of each head, biases
everywhere. Phi-3: as Llama, with fused matrices and a rope that may be long.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.llama import (
    BLOCK,
    CHOICES,
    CONFIG,
    DEFAULTS,
    LLAMA,
    MODULES,
    NO_BIASES,
    WEIGHTS,
    mistral_windows,
    to_hf,
)
from mechjax.models.families.rotary import rotary_dim, rotation
from mechjax.models.families.rule import Rule
from mechjax.models.rope import Rope


def _phi_rotation(hf: HfConfig) -> tuple[Rope, float]:
    return rotation(hf, part_default=0.5)


def _to_hf(config: Config) -> dict[str, Any]:
    return to_hf(config) | {"partial_rotary_factor": config.rotary_dim / config.d_head}


def _phi_to_hf(config: Config) -> dict[str, Any]:
    keys = {key: value for key, value in _to_hf(config).items() if key not in ("rms_norm_eps", "head_dim")}
    return keys | {"layer_norm_eps": config.norm_eps, "qk_layernorm": config.qk_norm != "none"}


def _linear(theirs: str, W: str, b: str, layout: str, bias: str) -> tuple[Rule, Rule]:
    return Rule(f"{theirs}.weight", (W,), layout), Rule(f"{theirs}.bias", (b,), bias)


PHI = Family(
    name="phi",
    architectures=("PhiForCausalLM",),
    model_type="phi",
    config={ours: theirs for ours, theirs in CONFIG.items() if ours not in ("norm_eps", "d_head")}
    | {
        "norm_eps": "layer_norm_eps",
        "rope": lambda hf: _phi_rotation(hf)[0],
        "rotary_dim": lambda hf: rotary_dim(hf, _phi_rotation(hf)[1]),
        "qk_norm": lambda hf: "shared" if hf["qk_layernorm"] else "none",
    },
    choices={
        "norm": "layer", "positions": "rotary", "residual": "parallel_shared", "mlp": "plain", "unembed_bias": True,
    },
    weights=(
        Rule("model.embed_tokens.weight", ("W_E",), "v m"),
        *_linear(BLOCK + "input_layernorm", "blocks.ln1.w", "blocks.ln1.b", "m", "m"),
        *_linear(BLOCK + "self_attn.q_proj", "blocks.attn.W_Q", "blocks.attn.b_Q", "(h d) m -> m h d", "(h d) -> h d"),
        *_linear(BLOCK + "self_attn.k_proj", "blocks.attn.W_K", "blocks.attn.b_K", "(n d) m -> m n d", "(n d) -> n d"),
        *_linear(BLOCK + "self_attn.v_proj", "blocks.attn.W_V", "blocks.attn.b_V", "(n d) m -> m n d", "(n d) -> n d"),
        *_linear(BLOCK + "self_attn.dense", "blocks.attn.W_O", "blocks.attn.b_O", "m (h d) -> h d m", "m"),
        *_linear(BLOCK + "self_attn.q_layernorm", "blocks.attn.q_norm.w", "blocks.attn.q_norm.b", "d", "d"),
        *_linear(BLOCK + "self_attn.k_layernorm", "blocks.attn.k_norm.w", "blocks.attn.k_norm.b", "d", "d"),
        *_linear(BLOCK + "mlp.fc1", "blocks.mlp.W_in", "blocks.mlp.b_in", "f m -> m f", "f"),
        *_linear(BLOCK + "mlp.fc2", "blocks.mlp.W_out", "blocks.mlp.b_out", "m f -> f m", "m"),
        *_linear("model.final_layernorm", "ln_final.w", "ln_final.b", "m", "m"),
        *_linear("lm_head", "W_U", "b_U", "v m -> m v", "v"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_phi_to_hf,
    defaults=DEFAULTS
    | {
        "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
        "hidden_act": "gelu_new", "layer_norm_eps": 1e-5, "qk_layernorm": False,
    },
    ignored=LLAMA.ignored | {"resid_pdrop", "embd_pdrop"},
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip


def _phi3_rotation(hf: HfConfig) -> tuple[Rope, float]:
    return rotation(hf, alias={"su": "longrope", "yarn": "longrope"})


def _phi3_to_hf(config: Config) -> dict[str, Any]:
    keys: dict[str, Any] = _to_hf(config) | {"sliding_window": config.windows[0] if config.windows else None}
    trained = keys.get("rope_scaling", {}).pop("original_max_position_embeddings", None)
    return keys if trained is None else keys | {"original_max_position_embeddings": trained}


_FUSED = ("q", "k", "v", "gate", "up")
PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_type="phi3",
    config=CONFIG
    | {
        "rope": lambda hf: _phi3_rotation(hf)[0],
        "rotary_dim": lambda hf: rotary_dim(hf, _phi3_rotation(hf)[1]),
        "windows": mistral_windows,
    },
    choices=CHOICES | NO_BIASES,
    weights=(
        *(rule for rule in WEIGHTS if not any(f".{part}_proj" in rule.name for part in _FUSED)),
        Rule(
            BLOCK + "self_attn.qkv_proj.weight",
            ("blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V"),
            "(h+n+n d) m -> m h+n+n d",
        ),
        Rule(BLOCK + "mlp.gate_up_proj.weight", ("blocks.mlp.W_gate", "blocks.mlp.W_in"), "(part f) m -> part m f"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_phi3_to_hf,
    defaults=DEFAULTS
    | {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "sliding_window": None,
    },
    required={"attention_bias": (False,)},
    ignored=LLAMA.ignored | {"resid_pdrop", "embd_pdrop", "original_max_position_embeddings"},
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip
