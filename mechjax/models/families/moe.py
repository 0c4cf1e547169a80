"""Llama-like families with experts: Mixtral, Qwen3-MoE, OLMoE and gpt-oss.

Jiang et al. 2024, arXiv:2401.04088; Yang et al. 2025, arXiv:2505.09388; Muennighoff et al. 2024, arXiv:2409.02060;
OpenAI 2025, arXiv:2508.10925. OLMoE clips after its norms where it clips at all, which is refused by name.
gpt-oss adds biases, sinks, windows on every other layer and a clamped gate; its files in mxfp4 are refused by name.
"""

from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.experts import Experts
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.layers import layer_types, types_to_hf, windows
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
from mechjax.models.families.rule import Rule

IGNORED = LLAMA.ignored | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise"}


def expert_rules(place: str, gate: str, linear: str, out: str) -> tuple[Rule, ...]:
    """One tensor for each expert, and the router's."""
    one = f"{BLOCK}{place}.experts.{{expert}}."
    return (
        Rule(f"{BLOCK}{place}.gate.weight", ("blocks.moe.W_router",), "e m -> m e"),
        Rule(f"{one}{gate}.weight", ("blocks.moe.W_gate",), "x m -> m x"),
        Rule(f"{one}{linear}.weight", ("blocks.moe.W_in",), "x m -> m x"),
        Rule(f"{one}{out}.weight", ("blocks.moe.W_out",), "m x -> x m"),
    )


def experts_of(config: Config, family: str) -> Experts:
    """The experts of a config.

    Raises:
        UnsupportedModelError: A config without.
    """
    if config.experts is None:
        raise UnsupportedModelError(f"The {family} family cannot express `experts` = None.")
    return config.experts


def _mixtral(hf: HfConfig) -> Experts:
    return Experts(
        n_experts=hf["num_local_experts"], top_k=hf["num_experts_per_tok"], d_expert=hf["intermediate_size"],
        normalized=True,
    )  # fmt: skip


def _mixtral_to_hf(config: Config) -> dict[str, Any]:
    experts = experts_of(config, "mixtral")
    return to_hf(config) | {
        "num_local_experts": experts.n_experts, "num_experts_per_tok": experts.top_k,
        "intermediate_size": experts.d_expert, "sliding_window": config.windows[0] if config.windows else None,
    }  # fmt: skip


def _sparse_layers(hf: HfConfig) -> tuple[int, ...] | None:
    n_layers, step, dense = (
        hf.count("num_hidden_layers"),
        hf.count("decoder_sparse_step"),
        hf["mlp_only_layers"] or [],
    )
    layers = tuple(i for i in range(n_layers) if i not in dense and (i + 1) % step == 0)
    return None if len(layers) == n_layers else layers


def _qwen3(hf: HfConfig) -> Experts | None:
    if (layers := _sparse_layers(hf)) == ():
        return None
    return Experts(
        n_experts=hf["num_experts"] if hf["num_local_experts"] is None else hf["num_local_experts"],
        top_k=hf["num_experts_per_tok"], d_expert=hf["moe_intermediate_size"], normalized=hf["norm_topk_prob"],
        layers=layers,
    )  # fmt: skip


def _qwen3_windows(hf: HfConfig) -> tuple[Any, ...] | None:
    used, _ = hf["use_sliding_window"], hf["sliding_window"]
    return mistral_windows(hf) if used else None


def _qwen3_to_hf(config: Config) -> dict[str, Any]:
    experts = experts_of(config, "qwen3_moe")
    return to_hf(config) | {
        "num_experts": experts.n_experts, "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.d_expert, "norm_topk_prob": experts.normalized,
        "mlp_only_layers": list(config.mlp_layers), "attention_bias": config.qkv_bias,
        "sliding_window": config.windows[0] if config.windows else None, "use_sliding_window": bool(config.windows),
    }  # fmt: skip


def _olmoe(hf: HfConfig) -> Experts:
    return Experts(
        n_experts=hf["num_experts"], top_k=hf["num_experts_per_tok"], d_expert=hf["intermediate_size"],
        normalized=hf["norm_topk_prob"],
    )  # fmt: skip


def _olmoe_to_hf(config: Config) -> dict[str, Any]:
    experts = experts_of(config, "olmoe")
    return to_hf(config) | {
        "num_experts": experts.n_experts, "num_experts_per_tok": experts.top_k, "intermediate_size": experts.d_expert,
        "norm_topk_prob": experts.normalized, "attention_bias": config.qkv_bias,
    }  # fmt: skip


def _gpt_oss(hf: HfConfig) -> Experts:
    return Experts(
        n_experts=hf["num_local_experts"], top_k=hf["num_experts_per_tok"], d_expert=hf["intermediate_size"],
        scoring="softmax_chosen", router_bias=True, biases=True, swiglu_alpha=hf["swiglu_alpha"],
        swiglu_limit=hf["swiglu_limit"], linear_offset=1.0,
    )  # fmt: skip


def _gpt_oss_to_hf(config: Config) -> dict[str, Any]:
    experts = experts_of(config, "gpt_oss")
    return to_hf(config) | types_to_hf(config) | {
        "num_local_experts": experts.n_experts, "num_experts_per_tok": experts.top_k,
        "intermediate_size": experts.d_expert, "swiglu_alpha": experts.swiglu_alpha,
        "swiglu_limit": experts.swiglu_limit, "attention_bias": config.qkv_bias,
    }  # fmt: skip


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_type="mixtral",
    config=CONFIG | {"windows": mistral_windows, "experts": _mixtral},
    choices=CHOICES | NO_BIASES,
    weights=(*WEIGHTS, *expert_rules("block_sparse_moe", "w1", "w3", "w2")),
    prefix="model.",
    modules=MODULES | {BLOCK + "mlp.gate": (None, "router_scores")},  # as transformers 5 calls it
    to_hf=_mixtral_to_hf,
    defaults=DEFAULTS
    | {
        "max_position_embeddings": 131072, "intermediate_size": 14336, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    ignored=IGNORED,
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_type="qwen3_moe",
    config=CONFIG
    | {
        "windows": _qwen3_windows, "qkv_bias": "attention_bias", "out_bias": "attention_bias", "experts": _qwen3,
    },
    choices=CHOICES | {"mlp_bias": False, "qk_norm": "shared"},
    weights=(
        *WEIGHTS,
        Rule(BLOCK + "self_attn.q_norm.weight", ("blocks.attn.q_norm.w",), "d"),
        Rule(BLOCK + "self_attn.k_norm.weight", ("blocks.attn.k_norm.w",), "d"),
        *expert_rules("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_qwen3_to_hf,
    defaults=DEFAULTS
    | {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
        "num_key_value_heads": 4, "max_position_embeddings": 32768, "use_sliding_window": False,
        "sliding_window": 4096, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
        "num_experts": 128, "num_local_experts": None, "norm_topk_prob": False, "mlp_only_layers": None,
    },
    ignored=IGNORED | {"max_window_layers"},
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip

OLMOE = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    model_type="olmoe",
    config=CONFIG
    | {"qkv_bias": "attention_bias", "out_bias": "attention_bias", "experts": _olmoe},
    choices=CHOICES | {"mlp_bias": False, "qk_norm": "joint"},
    weights=(
        *WEIGHTS,
        Rule(BLOCK + "self_attn.q_norm.weight", ("blocks.attn.q_norm.w",), "(h d) -> h d"),
        Rule(BLOCK + "self_attn.k_norm.weight", ("blocks.attn.k_norm.w",), "(n d) -> n d"),
        *expert_rules("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_olmoe_to_hf,
    defaults=DEFAULTS
    | {
        "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": False,
    },
    required={"clip_qkv": (None,)},
    ignored=IGNORED,
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip

GPT_OSS = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    model_type="gpt_oss",
    config=CONFIG
    | {
        "windows": lambda hf: windows(layer_types(hf, lambda layer: layer % 2 == 0), hf["sliding_window"]),
        "qkv_bias": "attention_bias", "out_bias": "attention_bias", "experts": _gpt_oss,
    },
    choices=CHOICES | {"mlp_bias": False, "attn_sinks": True},
    weights=(
        *WEIGHTS,
        Rule(BLOCK + "self_attn.sinks", ("blocks.attn.sinks",), "h"),
        Rule(BLOCK + "mlp.router.weight", ("blocks.moe.W_router",), "e m -> m e"),
        Rule(BLOCK + "mlp.router.bias", ("blocks.moe.b_router",), "e"),
        Rule(
            BLOCK + "mlp.experts.gate_up_proj",
            ("blocks.moe.W_gate", "blocks.moe.W_in"),
            "e m (x part) -> part e m x",
        ),
        Rule(
            BLOCK + "mlp.experts.gate_up_proj_bias",
            ("blocks.moe.b_gate", "blocks.moe.b_in"),
            "e (x part) -> part e x",
        ),
        Rule(BLOCK + "mlp.experts.down_proj", ("blocks.moe.W_out",), "e x m"),
        Rule(BLOCK + "mlp.experts.down_proj_bias", ("blocks.moe.b_out",), "e m"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_gpt_oss_to_hf,
    defaults=DEFAULTS
    | {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
        "attention_bias": True, "sliding_window": 128, "layer_types": None, "num_local_experts": 128,
        "num_experts_per_tok": 4, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    ignored=IGNORED | {"experts_per_token", "initial_context_length"},
)  # fmt: skip
