"""Command R (Cohere 2024) and Command R7B (Cohere 2024, Cohere2).

LayerNorm without bias, attention and MLP in parallel through one norm, rotary positions in pairs, gated MLP, a factor
on the logits. Cohere may have norms on queries and keys; Cohere2 has windows, and layers without one do not rotate.
"""

from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.family import Family, HfConfig
from mechjax.models.families.layers import layer_types, types_to_hf, windows
from mechjax.models.families.llama import BLOCK, CONFIG, DEFAULTS, LLAMA, MODULES, WEIGHTS, to_hf
from mechjax.models.families.rotary import whole_rotation
from mechjax.models.families.rule import Rule

_CONFIG = {ours: theirs for ours, theirs in CONFIG.items() if ours != "norm_eps"} | {
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "out_bias": "attention_bias",
    "logit_scale": "logit_scale",
}
_CHOICES = {
    "norm": "layer", "norm_bias": False, "positions": "rotary", "rotary_layout": "pairs",
    "residual": "parallel_shared", "mlp": "gated", "mlp_bias": False,
}  # fmt: skip
_DEFAULTS = DEFAULTS | {
    "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "logit_scale": 0.0625,
    "num_hidden_layers": 40, "num_attention_heads": 64, "max_position_embeddings": 8192, "layer_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}  # fmt: skip


def _to_hf(config: Config) -> dict[str, Any]:
    keys = to_hf(config) | {"attention_bias": config.qkv_bias, "logit_scale": config.logit_scale}
    return keys | {"layer_norm_eps": keys.pop("rms_norm_eps")}


COHERE = Family(
    name="cohere",
    architectures=("CohereForCausalLM",),
    model_type="cohere",
    config=_CONFIG | {"qk_norm": lambda hf: "per_head" if hf["use_qk_norm"] else "none"},
    choices=_CHOICES,
    weights=(
        *WEIGHTS,
        Rule(BLOCK + "self_attn.q_norm.weight", ("blocks.attn.q_norm.w",), "h d"),
        Rule(BLOCK + "self_attn.k_norm.weight", ("blocks.attn.k_norm.w",), "n d"),
    ),
    prefix="model.",
    modules=MODULES,
    to_hf=lambda config: _to_hf(config) | {"use_qk_norm": config.qk_norm != "none"},
    defaults=_DEFAULTS | {"rope_theta": 500000.0, "use_qk_norm": False},
    ignored=LLAMA.ignored,
    ignored_weights=LLAMA.ignored_weights,
)


def _windows(hf: HfConfig) -> tuple[Any, ...] | None:
    every = hf["sliding_window_pattern"]
    return windows(layer_types(hf, lambda layer: bool((layer + 1) % every)), hf["sliding_window"])


def _rope(hf: HfConfig) -> Any:
    sizes, rope = _windows(hf), whole_rotation(hf)
    if sizes is None:
        raise UnsupportedModelError(
            "The config has no layer with a window. In Cohere2 the others do not rotate, so such a model would not "
            "know positions at all, which is not implemented."
        )
    return rope if None not in sizes else tuple(None if size is None else rope for size in sizes)


def _whole_heads(hf: HfConfig) -> None:
    given, n_heads = hf["head_dim"], hf.count("num_attention_heads", 2**31 - 1)
    if given is not None and given * n_heads != hf["hidden_size"]:
        raise UnsupportedModelError(
            f"The config has `head_dim` = {given!r}: transformers' own cohere2 ignores it, so what is meant is "
            f"unclear; only `hidden_size` / `num_attention_heads` = {hf['hidden_size'] / n_heads:g} is accepted."
        )


COHERE2 = Family(
    name="cohere2",
    architectures=("Cohere2ForCausalLM",),
    model_type="cohere2",
    config=_CONFIG | {"windows": _windows, "rope": _rope, "d_head": _whole_heads},
    choices=_CHOICES,
    weights=WEIGHTS,
    prefix="model.",
    modules=MODULES,
    to_hf=lambda config: _to_hf(config) | types_to_hf(config),
    defaults=_DEFAULTS | {"sliding_window": 4096, "layer_types": None, "sliding_window_pattern": 4},
    required={
        "use_qk_norm": (False,), "use_gated_activation": (True,), "use_parallel_block": (True,), "rotary_pct": (1.0,),
        "position_embedding_type": ("rope_gptj",), "order_of_interleaved_layers": ("local_attn_first",),
    },
    ignored=LLAMA.ignored | {"layer_switch", "use_embedding_sharing", "use_parallel_embedding", "cache_implementation"},
    ignored_weights=LLAMA.ignored_weights,
)  # fmt: skip
