"""StableLM (Bellagente et al. 2024, arXiv:2402.17834).

As Llama with LayerNorms and rotary positions on part of each head; some have attention and MLP in parallel through one
norm, and norms on queries and keys with a scale for each head.
"""

from typing import Any

from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.llama import BLOCK, CONFIG, DEFAULTS, LLAMA, MODULES, WEIGHTS, to_hf
from mechjax.models.families.rotary import rotary_dim, rotation
from mechjax.models.families.rule import Rule
from mechjax.models.rope import Rope


def _rotation(hf: HfConfig) -> tuple[Rope, float]:
    return rotation(hf, part_default=0.25)


def _to_hf(config: Config) -> dict[str, Any]:
    keys = {key: value for key, value in to_hf(config).items() if key not in ("rms_norm_eps", "head_dim")}
    return keys | {
        "layer_norm_eps": config.norm_eps, "partial_rotary_factor": config.rotary_dim / config.d_head,
        "use_qkv_bias": config.qkv_bias, "qk_layernorm": config.qk_norm != "none",
        "use_parallel_residual": config.residual != "serial",
    }  # fmt: skip


STABLELM = Family(
    name="stablelm",
    architectures=("StableLmForCausalLM",),
    model_type="stablelm",
    config={ours: theirs for ours, theirs in CONFIG.items() if ours not in ("norm_eps", "d_head")}
    | {
        "norm_eps": "layer_norm_eps",
        "rope": lambda hf: _rotation(hf)[0],
        "rotary_dim": lambda hf: rotary_dim(hf, _rotation(hf)[1]),
        "qkv_bias": "use_qkv_bias",
        "qk_norm": lambda hf: "per_head" if hf["qk_layernorm"] else "none",
        "residual": lambda hf: "parallel_shared" if hf["use_parallel_residual"] else "serial",
    },
    choices={
        "norm": "layer", "positions": "rotary", "mlp": "gated", "out_bias": False, "mlp_bias": False,
        "qk_norm_bias": False,
    },
    weights=(
        *WEIGHTS,
        Rule(BLOCK + "input_layernorm.bias", ("blocks.ln1.b",), "m"),
        Rule(BLOCK + "post_attention_layernorm.bias", ("blocks.ln2.b",), "m"),
        Rule(BLOCK + "self_attn.q_layernorm.norms.{head}.weight", ("blocks.attn.q_norm.w",), "d"),
        Rule(BLOCK + "self_attn.k_layernorm.norms.{kv_head}.weight", ("blocks.attn.k_norm.w",), "d"),
        Rule("model.norm.bias", ("ln_final.b",), "m"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=_to_hf,
    defaults=DEFAULTS
    | {
        "vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "layer_norm_eps": 1e-5, "use_qkv_bias": False, "qk_layernorm": False,
        "use_parallel_residual": False,
    },
    ignored=LLAMA.ignored | {"hidden_dropout"},
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip
