"""Mamba (arXiv:2312.00752), Mamba-2 (arXiv:2405.21060) and Falcon Mamba (arXiv:2410.05355).

RMSNorm before each mixer, no positions. Mamba-2's convolution runs over x, B and C in one tensor; Falcon Mamba norms
B, C and the rates' latent, without scales.
"""

import math
from dataclasses import replace
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.families.family import Family, HfConfig, activation
from mechjax.models.families.rule import Rule
from mechjax.models.mamba_config import MambaConfig

_MIXER = "backbone.layers.{}.mixer."


def _of(name: str, paths: str, layout: str) -> Rule:
    return Rule(_MIXER + name, tuple(f"blocks.mixer.{path}" for path in paths.split()), layout)


_ENDS = (
    Rule("backbone.embeddings.weight", ("W_E",), "v m"),
    Rule("backbone.layers.{}.norm.weight", ("blocks.ln1.w",), "m"),
    _of("out_proj.weight", "W_O", "m i -> i m"),
    _of("out_proj.bias", "b_O", "m"),
    Rule("backbone.norm_f.weight", ("ln_final.w",), "m"),
    Rule("lm_head.weight", ("W_U",), "v m -> m v"),
)
_WEIGHTS = (
    *_ENDS,
    _of("in_proj.weight", "W_x W_gate", "(part i) m -> part m i"),
    _of("in_proj.bias", "b_x b_gate", "(part i) -> part i"),
    _of("conv1d.weight", "conv_x", "i 1 k -> i (1 k)"),
    _of("conv1d.bias", "b_conv_x", "i"),
    _of("x_proj.weight", "W_dt_in W_B W_C", "r+n+n i -> i r+n+n"),
    _of("dt_proj.weight", "W_dt", "i r -> r i"),
    _of("dt_proj.bias", "b_dt", "i"),
    _of("A_log", "A_log", "i n"),
    _of("D", "D", "i"),
)
_WEIGHTS_2 = (
    *_ENDS,
    _of("in_proj.weight", "W_gate W_x W_B W_C W_dt", "i+i+s+s+h m -> m i+i+s+s+h"),
    _of("in_proj.bias", "b_gate b_x b_B b_C b_dt_in", "i+i+s+s+h"),
    _of("conv1d.weight", "conv_x conv_B conv_C", "i+s+s 1 k -> i+s+s (1 k)"),
    _of("conv1d.bias", "b_conv_x b_conv_B b_conv_C", "i+s+s"),
    _of("dt_bias", "b_dt", "h"),
    _of("A_log", "A_log", "h"),
    _of("D", "D", "h"),
    _of("norm.weight", "norm.w", "i"),
)


def _d_inner(hf: HfConfig) -> int:
    """As stored or, where it is not, so many times the stream's width."""
    expand, width = hf["expand"], hf.count("hidden_size", 2**31 - 1)
    if hf["intermediate_size"] is not None:
        return hf.count("intermediate_size", 2**31 - 1)
    if not isinstance(expand, (int, float)) or isinstance(expand, bool) or not 0 < expand * width < 2**31:
        raise UnsupportedModelError(f"The config has `expand` = {expand!r}; it must be a positive number.")
    return int(expand * width)


def _dt_rank(hf: HfConfig) -> int:
    if hf["time_step_rank"] == "auto":
        return math.ceil(hf.count("hidden_size", 2**31 - 1) / 16)
    return hf.count("time_step_rank", 2**31 - 1)


def _dt_limit(hf: HfConfig) -> Any:
    """Two numbers, of which transformers writes infinity in words."""
    limit = hf["time_step_limit"]
    read = lambda x: float(x["__float__"]) if isinstance(x, dict) and x.keys() == {"__float__"} else x
    return tuple(read(x) for x in limit) if isinstance(limit, (list, tuple)) else limit


_CONFIG: dict[str, Any] = {
    "d_vocab": "vocab_size",
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "norm_eps": "layer_norm_epsilon",
    "d_inner": _d_inner,
    "d_state": "state_size",
    "d_conv": "conv_kernel",
    "activation": activation("hidden_act"),
    "conv_bias": "use_conv_bias",
    "proj_bias": "use_bias",
    "residual_float32": "residual_in_fp32",
    "tied": "tie_word_embeddings",
}
_DEFAULTS = {
    "vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "layer_norm_epsilon": 1e-5, "expand": 2,
    "intermediate_size": None, "state_size": 16, "conv_kernel": 4, "hidden_act": "silu", "use_conv_bias": True,
    "use_bias": False, "residual_in_fp32": True, "tie_word_embeddings": True, "time_step_rank": "auto",
}  # fmt: skip
_IGNORED = frozenset({
    # How parameters were first drawn, and which of equal programs runs.
    "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme", "time_step_floor",
    "rescale_prenorm_residual", "emb_initializer_range", "A_initializer_range", "use_mambapy", "use_falcon_mambapy",
    "use_associative_scan", "fused_add_norm", "chunk_size",
    # What the first conversions kept of the original config; transformers reads none of it.
    "d_model", "n_layer", "d_inner", "ssm_cfg", "pad_vocab_size_multiple", "rms_norm", "norm_before_gate",
})  # fmt: skip
_READS = {
    "blocks.ln1.w": ("mixer_in", ("ln1.normalized",)),
    "blocks.mixer.W_gate": (None, ("gate",)),
    "blocks.mixer.W_x": (None, ("conv_in",)),
    "blocks.mixer.W_O": ("gated", ("mixer_out",)),
}
_READS_1 = _READS | {
    "blocks.mixer.W_dt_in": ("ssm_in", ("delta_latent",)),
    "blocks.mixer.W_B": ("ssm_in", ("B",)),
    "blocks.mixer.W_C": ("ssm_in", ("C",)),
}
_READS_2 = _READS | {
    "blocks.mixer.W_B": (None, ("B_in",)),
    "blocks.mixer.W_C": (None, ("C_in",)),
    "blocks.mixer.W_dt": (None, ()),  # its bias stands in another module
    "blocks.mixer.norm.w": ("ssm_out", ("gated_norm.normalized",)),
    "blocks.mixer.W_O": ("gated_norm.normalized", ("mixer_out",)),
}
_READS_FALCON = _READS_1 | {
    f"blocks.mixer.{name}": ("ssm_in", ())
    for name in ("W_dt_in", "W_B", "W_C")  # before their norms
}


def _to_hf(config: MambaConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.d_vocab, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "layer_norm_epsilon": config.norm_eps, "expand": max(1, config.d_inner // config.d_model),
        "state_size": config.d_state, "conv_kernel": config.d_conv, "hidden_act": config.activation,
        "use_conv_bias": config.conv_bias, "use_bias": config.proj_bias, "residual_in_fp32": config.residual_float32,
        "tie_word_embeddings": config.tied,
    }  # fmt: skip


def _mamba_to_hf(config: MambaConfig) -> dict[str, Any]:
    return _to_hf(config) | {"time_step_rank": config.dt_rank, "intermediate_size": config.d_inner}


def _falcon_to_hf(config: MambaConfig) -> dict[str, Any]:
    return _mamba_to_hf(config) | {"mixer_rms_eps": config.mixer_norm_eps}


def _mamba2_to_hf(config: MambaConfig) -> dict[str, Any]:
    own = {"num_heads": config.n_heads, "head_dim": config.d_head, "n_groups": config.n_groups}
    limit = [x if math.isfinite(x) else {"__float__": "Infinity"} for x in config.dt_limit]
    return _to_hf(config) | own | {"time_step_limit": limit}


MAMBA = Family(
    name="mamba",
    architectures=("MambaForCausalLM",),
    model_type="mamba",
    config=_CONFIG | {"dt_rank": _dt_rank},
    choices={"mixer": "mamba"},
    weights=_WEIGHTS,
    prefix="backbone.",
    to_hf=_mamba_to_hf,
    defaults=_DEFAULTS,
    ignored=_IGNORED,
    kind=MambaConfig,
    older={"embeddings.weight": "embedding.weight"},
    modules={"backbone.layers.{}.mixer": ("ln1.normalized", "mixer_out"), "lm_head": (None, "logits")},
    reads=_READS_1,
)
FALCON_MAMBA = replace(
    MAMBA,
    name="falcon_mamba",
    architectures=("FalconMambaForCausalLM",),
    model_type="falcon_mamba",
    config=_CONFIG | {"dt_rank": _dt_rank, "mixer_norm_eps": "mixer_rms_eps"},
    to_hf=_falcon_to_hf,
    defaults=_DEFAULTS | {"mixer_rms_eps": 1e-6},
    modules=dict(MAMBA.modules) | {
        _MIXER + "dt_layernorm": (None, "delta_latent"),
        _MIXER + "b_layernorm": (None, "B"),
        _MIXER + "c_layernorm": (None, "C"),
    },
    reads=_READS_FALCON,
)  # fmt: skip
MAMBA2 = replace(
    MAMBA,
    name="mamba2",
    architectures=("Mamba2ForCausalLM",),
    model_type="mamba2",
    config=_CONFIG | {
        "n_heads": "num_heads", "d_head": "head_dim", "n_groups": "n_groups", "dt_limit": _dt_limit,
    },
    choices={"mixer": "mamba2"},
    weights=_WEIGHTS_2,
    to_hf=_mamba2_to_hf,
    defaults=_DEFAULTS | {
        "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "state_size": 128, "num_heads": 128,
        "head_dim": 64, "n_groups": 8, "tie_word_embeddings": False, "time_step_limit": (0.0, math.inf),
    },
    ignored=_IGNORED | {"time_step_rank"},
    reads=_READS_2,
)  # fmt: skip

MAMBAS: tuple[Family, ...] = (MAMBA, MAMBA2, FALCON_MAMBA)
"""Every family of state space models."""
