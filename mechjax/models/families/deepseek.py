"""DeepSeek-V2 (arXiv:2405.04434) and DeepSeek-V3 (arXiv:2412.19437): latent attention, experts after dense layers.

Layers that predict further tokens (V3's `model.layers.61`) are left out, as transformers does.
"""

import math
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.experts import Experts
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.llama import BLOCK, CHOICES, CONFIG, DEFAULTS, MODULES, WEIGHTS, to_hf
from mechjax.models.families.moe import IGNORED, expert_rules, experts_of
from mechjax.models.families.rotary import of_object, whole_rotation
from mechjax.models.families.rule import Rule
from mechjax.models.latent import Latent
from mechjax.models.rope import Rope, Yarn


def _latent(hf: HfConfig) -> Latent:
    return Latent(
        q_rank=hf["q_lora_rank"], kv_rank=hf["kv_lora_rank"], d_nope=hf["qk_nope_head_dim"],
        d_rope=hf["qk_rope_head_dim"], d_value=hf["v_head_dim"],
    )  # fmt: skip


def _attn_scale(hf: HfConfig) -> float:
    """Longer contexts sharpen attention by the square of what `mscale_all_dim` says."""
    scale = _width(hf) ** -0.5
    strength = (of_object(hf, "rope_scaling") or of_object(hf, "rope_parameters")).get("mscale_all_dim")
    stretch = whole_rotation(hf).stretch
    if not strength or not isinstance(stretch, Yarn) or stretch.factor <= 1:
        return scale
    return scale * (0.1 * strength * math.log(stretch.factor) + 1) ** 2


def _width(hf: HfConfig) -> int:
    return hf.count("qk_nope_head_dim") + hf.count("qk_rope_head_dim")


def _layers(hf: HfConfig) -> tuple[int, ...] | None:
    first = hf["first_k_dense_replace"] or 0
    return tuple(range(first, hf.count("num_hidden_layers"))) if first else None


def _v2_experts(hf: HfConfig) -> Experts:
    grouped = hf["topk_method"] == "group_limited_greedy"
    groups, top = hf["n_group"], hf["topk_group"]
    return Experts(
        n_experts=hf["n_routed_experts"], top_k=hf["num_experts_per_tok"], d_expert=hf["moe_intermediate_size"],
        scale=hf["routed_scaling_factor"], n_groups=groups if grouped else 1, top_groups=top if grouped else 1,
        d_shared=hf["n_shared_experts"] * hf["moe_intermediate_size"], layers=_layers(hf),
    )  # fmt: skip


def _v3_experts(hf: HfConfig) -> Experts:
    return Experts(
        n_experts=hf["n_routed_experts"], top_k=hf["num_experts_per_tok"], d_expert=hf["moe_intermediate_size"],
        scoring="sigmoid", choice_bias=True, normalized=hf["norm_topk_prob"], scale=hf["routed_scaling_factor"],
        n_groups=hf["n_group"], top_groups=hf["topk_group"], group_score="top2",
        d_shared=hf["n_shared_experts"] * hf["moe_intermediate_size"], layers=_layers(hf),
    )  # fmt: skip


def _to_hf(config: Config, family: str) -> dict[str, Any]:
    if config.latent is None:
        raise UnsupportedModelError(f"The {family} family cannot express `latent` = None.")
    experts_of(config, family)
    hf: dict[str, Any] = to_hf(config) | {"attention_bias": config.qkv_bias}
    hf.pop("head_dim")
    if (latent := config.latent) is not None:
        hf |= {
            "q_lora_rank": latent.q_rank, "kv_lora_rank": latent.kv_rank, "qk_nope_head_dim": latent.d_nope,
            "qk_rope_head_dim": latent.d_rope, "v_head_dim": latent.d_value,
        }  # fmt: skip
    if (
        isinstance(config.rope, Rope)
        and isinstance(stretch := config.rope.stretch, Yarn)
        and stretch.factor > 1
    ):
        sharpened = math.sqrt(config.attn_scale * math.sqrt(config.d_head)) - 1
        hf["rope_scaling"] |= {"mscale_all_dim": round(sharpened / (0.1 * math.log(stretch.factor)), 9)}
    if (experts := config.experts) is not None:
        hf |= {
            "n_routed_experts": experts.n_experts, "num_experts_per_tok": experts.top_k,
            "moe_intermediate_size": experts.d_expert, "routed_scaling_factor": experts.scale,
            "n_shared_experts": experts.d_shared // experts.d_expert, "n_group": experts.n_groups,
            "topk_group": experts.top_groups, "first_k_dense_replace": len(config.mlp_layers),
        }  # fmt: skip
    return hf


def _v2_to_hf(config: Config) -> dict[str, Any]:
    grouped = config.experts is not None and config.experts.n_groups > 1
    return _to_hf(config, "deepseek_v2") | {"topk_method": "group_limited_greedy" if grouped else "greedy"}


def _v3_to_hf(config: Config) -> dict[str, Any]:
    return _to_hf(config, "deepseek_v3") | {
        "norm_topk_prob": config.experts is not None and config.experts.normalized,
        "rope_interleave": config.rotary_layout == "pairs",
    }  # fmt: skip


def _has_rank(config: Config) -> bool:
    return config.latent is not None and config.latent.q_rank is not None


_CONFIG = {name: read for name, read in CONFIG.items() if name not in ("n_kv_heads", "d_head")} | {
    "n_kv_heads": lambda hf: hf["num_key_value_heads"] or hf["num_attention_heads"],
    "d_head": _width, "rotary_dim": "qk_rope_head_dim", "attn_scale": _attn_scale, "latent": _latent,
    "qkv_bias": "attention_bias", "out_bias": "attention_bias",
}  # fmt: skip
_SHARED = BLOCK + "mlp.shared_experts."
_WEIGHTS = (
    *(rule for rule in WEIGHTS if not rule.name.endswith(("q_proj.weight", "q_proj.bias", "o_proj.weight"))),
    Rule(
        BLOCK + "self_attn.q_proj.weight",
        ("blocks.attn.W_Q",),
        "(h d) m -> m h d",
        lambda c: not _has_rank(c),
    ),
    Rule(BLOCK + "self_attn.q_a_proj.weight", ("blocks.attn.W_DQ",), "q m -> m q"),
    Rule(BLOCK + "self_attn.q_a_proj.bias", ("blocks.attn.b_DQ",), "q"),
    Rule(BLOCK + "self_attn.q_a_layernorm.weight", ("blocks.attn.w_q",), "q"),
    Rule(BLOCK + "self_attn.q_b_proj.weight", ("blocks.attn.W_Q",), "(h d) q -> q h d", _has_rank),
    Rule(
        BLOCK + "self_attn.kv_a_proj_with_mqa.weight",
        ("blocks.attn.W_DKV", "blocks.attn.W_KR"),
        "c+t m -> m c+t",
    ),
    Rule(BLOCK + "self_attn.kv_a_proj_with_mqa.bias", ("blocks.attn.b_DKV", "blocks.attn.b_KR"), "c+t"),
    Rule(BLOCK + "self_attn.kv_a_layernorm.weight", ("blocks.attn.w_kv",), "c"),
    Rule(
        BLOCK + "self_attn.kv_b_proj.weight", ("blocks.attn.W_UK", "blocks.attn.W_UV"), "(h o+u) c -> c h o+u"
    ),
    Rule(BLOCK + "self_attn.o_proj.weight", ("blocks.attn.W_O",), "m (h u) -> h u m"),
    *expert_rules("mlp", "gate_proj", "up_proj", "down_proj"),
    Rule(BLOCK + "mlp.gate.e_score_correction_bias", ("blocks.moe.b_choice",), "e"),
    Rule(_SHARED + "gate_proj.weight", ("blocks.moe.shared.W_gate",), "s m -> m s"),
    Rule(_SHARED + "up_proj.weight", ("blocks.moe.shared.W_in",), "s m -> m s"),
    Rule(_SHARED + "down_proj.weight", ("blocks.moe.shared.W_out",), "m s -> s m"),
)
_DEFAULTS = DEFAULTS | {
    "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
_IGNORED = IGNORED | {
    "head_dim", "qk_head_dim", "aux_loss_alpha", "seq_aux", "ep_size", "num_nextn_predict_layers",
}  # fmt: skip

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    config=_CONFIG | {"experts": _v2_experts},
    choices=CHOICES | {"mlp_bias": False, "rotary_layout": "pairs"},
    weights=_WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_v2_to_hf,
    defaults=_DEFAULTS
    | {
        "vocab_size": 102400, "first_k_dense_replace": 0, "n_group": None, "n_routed_experts": 64,
        "n_shared_experts": 2, "routed_scaling_factor": 1.0, "topk_group": None, "topk_method": "greedy",
        "moe_intermediate_size": 1407,
    },
    required={
        "norm_topk_prob": (False,), "mlp_bias": (False,), "scoring_func": ("softmax",), "moe_layer_freq": (1,),
    },
    ignored=_IGNORED,
)  # fmt: skip

DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    config=_CONFIG
    | {"experts": _v3_experts, "rotary_layout": lambda hf: "pairs" if hf["rope_interleave"] else "halves"},
    choices=CHOICES | {"mlp_bias": False},
    weights=_WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=_v3_to_hf,
    defaults=_DEFAULTS
    | {
        "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1,
        "n_routed_experts": 256, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4,
        "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True,
        "max_position_embeddings": 4096, "rope_interleave": True,
    },
    required={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",), "moe_layer_freq": (1,)},
    ignored=_IGNORED,
    ignored_weights=(r"model\.layers\.61\..*",),
)  # fmt: skip
