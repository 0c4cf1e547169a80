"""What rewrites presume of a model: choices and parameters that they do not know are refused by name."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.decoder import Decoder
from mechjax.models.params import assemble, parameters
from mechjax.models.quantized import holds_quantized

_ANY = None
_CHOICES: Mapping[str, tuple[Any, ...] | None] = {
    "norm": ("layer", "rms"),
    "norms": ("pre", "post", "both", "none"),
    "qk_norm": ("none", "shared", "per_head", "joint"),
    "positions": ("learned", "rotary", "alibi", "none"),
    "residual": ("serial", "parallel", "parallel_shared"),
    "mlp": ("plain", "gated", "none"),
} | dict.fromkeys(
    (
        "d_vocab", "n_ctx", "d_model", "n_layers", "n_heads", "n_kv_heads", "d_head", "d_mlp", "norm_eps",
        "norm_weight", "norm_offset", "norm_bias", "qk_norm_bias", "embed_scale", "embed_norm",
        "position_offset", "rotary_dim", "rotary_layout", "rope", "alibi_scale", "alibi_dtype", "residual_scale",
        "activation", "qkv_bias", "out_bias", "mlp_bias", "unembed_bias", "qkv_clip", "tied", "attn_softcap",
        "final_softcap", "causal", "windows", "attn_scale", "attn_sinks", "logit_scale", "experts", "latent",
        "precision", "source",
    ),
    _ANY,
)  # fmt: skip
"""Field of a config -> the values that rewrites know; None where every value is the same to them."""

_PARAMETERS = frozenset({
    "W_E", "W_pos", "W_U", "b_U", "blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V", "blocks.attn.W_O",
    "blocks.attn.b_Q", "blocks.attn.b_K", "blocks.attn.b_V", "blocks.attn.b_O", "blocks.mlp.W_in",
    "blocks.mlp.W_gate", "blocks.mlp.W_out", "blocks.mlp.b_in", "blocks.mlp.b_gate", "blocks.mlp.b_out",
    "blocks.attn.sinks", "blocks.moe.W_router", "blocks.moe.b_router", "blocks.moe.b_choice", "blocks.moe.W_in",
    "blocks.moe.W_gate", "blocks.moe.W_out", "blocks.moe.b_in", "blocks.moe.b_gate", "blocks.moe.b_out",
    "blocks.moe.shared.W_in", "blocks.moe.shared.W_gate", "blocks.moe.shared.W_out", "blocks.moe.W_shared_gate",
    *(
        f"blocks.attn.{name}"
        for name in ("W_DQ", "b_DQ", "w_q", "W_DKV", "b_DKV", "w_kv", "W_UK", "W_UV", "W_KR", "b_KR")
    ),
    *(
        f"{norm}.{part}"
        for norm in (
            "ln_embed", "blocks.ln1", "blocks.ln1_post", "blocks.ln2", "blocks.ln2_post", "ln_final",
            "blocks.attn.q_norm", "blocks.attn.k_norm",
        )
        for part in "wb"
    ),
})  # fmt: skip
"""Every parameter that rewrites know."""


def refusal(rewrite: str, found: str, why: str, fix: str) -> UnsupportedModelError:
    """The error of a rewrite that would change what the model computes."""
    return UnsupportedModelError(
        f"`{rewrite}` cannot be applied to this model, which has {found}: {why} {fix}"
    )


def presume(model: Decoder, rewrite: str) -> None:
    """Refuse a model with choices or parameters that rewrites do not know; `rewrite` is what was asked for.

    Raises:
        UnsupportedModelError: Such a choice or parameter, by name.
    """
    if holds_quantized(model):
        raise refusal(
            rewrite, "matrices in few bits", "a rewrite changes weights, which would have to be rounded again.",
            "Rewrite first and quantise then, or apply `mj.models.dequantize` before.",
        )  # fmt: skip
    found = []
    for field in fields(model.config):
        value = getattr(model.config, field.name)
        known = _CHOICES[field.name] if field.name in _CHOICES else (_default(field),)
        if known is not _ANY and value not in known:
            found.append(f"`{field.name}` = {value!r}")
    found += [f"the parameter `{path}`" for path in parameters(model) if path not in _PARAMETERS]
    if found:
        raise refusal(
            rewrite, ", ".join(found), "it was not written for that, and would perhaps change the logits.",
            "Use the model as it is.",
        )  # fmt: skip


def rebuild(model: Decoder, params: Mapping[str, Array], **choices: Any) -> Decoder:
    """The model with other parameters and choices; a bias that only the new choices have is zero."""
    config = replace(model.config, **choices)
    dtype = model.W_E.dtype
    return assemble(
        config,
        {
            path: params[path] if path in params else jnp.zeros(shape, dtype)
            for path, shape in config.shapes.items()
            if path in params or "b_" in path
        },
    )


def untied(model: Decoder) -> Decoder:
    """The model with an unembedding of its own, so that one side can change without the other."""
    if model.W_U is not None:
        return model
    return rebuild(model, parameters(model) | {"W_U": model.W_E.T}, tied=False)


def _default(field: Any) -> Any:
    return None if field.default is MISSING else field.default
