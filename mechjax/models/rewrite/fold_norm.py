"""Move what norms multiply and add into the matrices that read them."""

import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.meshes import on_any_mesh
from mechjax.models.config import Config
from mechjax.models.contraction import contract, widened
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.premises import presume, rebuild, refusal, untied

_ATTENTION = ("blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V")
_LATENT = ("blocks.attn.W_DKV", "blocks.attn.W_KR")
_OF_LATENTS = {
    "blocks.attn.w_q": ("blocks.attn.W_Q",),
    "blocks.attn.w_kv": ("blocks.attn.W_UK", "blocks.attn.W_UV"),
}
"""Scales of latents' norms, and what reads the latents."""
_PER_EXPERT = ("blocks.moe.W_in", "blocks.moe.W_gate")
_MLP = (
    "blocks.mlp.W_in", "blocks.mlp.W_gate", "blocks.moe.W_router", *_PER_EXPERT, "blocks.moe.shared.W_in",
    "blocks.moe.shared.W_gate", "blocks.moe.W_shared_gate",
)  # fmt: skip


@needs_decoder("weights")
@on_any_mesh
def fold_norm(model: Decoder) -> Decoder:
    """Fold the scales and biases of the norms into the matrices that read them.

    A norm's output is `x_hat * w + b`, of which a matrix reads `x_hat @ (w * W) + b @ W`. Afterwards every `w` is
    1 (0 where `norm_offset` adds the 1) and every `b` is 0, so that rows of `W_Q`, `W_in`, `W_U` are directions
    of the normalised residual stream itself and heads of different layers can be compared. `ln1.normalized` and
    its like become `x_hat`. Norms of which no matrix reads the output stay: those on what is written, on
    queries and keys, and on embeddings. Norms of latents are folded too.

    Keeps: logits, and every site but the outputs of norms. Exact up to one rounding of each weight; a second
    time changes no bit. Where norms have biases, the matrices that read them have biases afterwards; a tied
    unembedding is untied, because `ln_final` acts on one side only, which costs `d_vocab * d_model` numbers.
    Where two experts score the same but for rounding, another may be chosen.

    Raises:
        UnsupportedModelError: Norms have biases, which experts or latents would read without biases of their own; or
            the model has a choice that this was not written for.
    """
    config = model.config
    presume(model, "fold_norm")
    _check_biases(config)
    params = parameters(untied(model))
    for scale, matrices in _readers(config).items():
        w, b = params.get(scale), params.get(scale.replace(".w", ".b"))
        offset = 0.0 if scale in _OF_LATENTS else config.norm_offset
        for path in params.keys() & set(matrices):
            W = params[path]
            if b is not None:
                read, bias = _times(widened(b), widened(W), model), path.replace("W_", "b_")
                params[bias] = (read if bias not in params else widened(params[bias]) + read).astype(W.dtype)
            if w is not None:
                times = _along(widened(w) + offset, W, path, model)
                params[path] = (widened(W) * times).astype(W.dtype)
        if w is not None:
            params[scale] = jnp.full_like(w, 1 - offset)
        if b is not None:
            params[scale.replace(".w", ".b")] = jnp.zeros_like(b)
    biases = {"qkv_bias": "blocks.attn.b_Q", "mlp_bias": "blocks.mlp.b_in", "unembed_bias": "b_U"}
    given = {choice: True for choice, path in biases.items() if path in params}
    return rebuild(model, params, tied=False, **given)


def _check_biases(config: Config) -> None:
    for choice in ("experts", "latent"):
        if config.norm_bias and (found := getattr(config, choice)) is not None:
            raise refusal(
                "fold_norm", f"`norm_bias` = True with `{choice}` = {found!r}",
                "matrices that read the norms' biases have no biases of their own to hold them.",
                "Leave this step out: the other rewrites do not need it.",
            )  # fmt: skip


def _readers(config: Config) -> dict[str, tuple[str, ...]]:
    """For the scales of every norm that matrices read: those matrices."""
    attention = _ATTENTION
    if config.latent is not None:
        attention = ("blocks.attn.W_Q" if config.latent.q_rank is None else "blocks.attn.W_DQ", *_LATENT)
    both = attention + _MLP if config.residual == "parallel_shared" else attention
    return {"blocks.ln1.w": both, "blocks.ln2.w": _MLP, "ln_final.w": ("W_U",)} | _OF_LATENTS


def _along(scale: Array, W: Array, path: str, model: Decoder) -> Array:
    """A norm's scales along the axis of `W` that reads them, for the layers that have `W`."""
    if scale.ndim == 2 and len(scale) != len(W):
        config = model.config
        scale = scale[jnp.array(config.expert_layers if ".moe." in path else config.mlp_layers)]
    if path in _PER_EXPERT:
        scale = scale[:, None]
    return scale.reshape(*scale.shape, *[1] * (W.ndim - scale.ndim))


def _times(b: Array, W: Array, model: Decoder) -> Array:
    """`b @ W` of every layer, whatever axes the matrix writes to."""
    flat = W.reshape(*b.shape, -1)
    return contract("...m,...mo->...o", b, flat, model.config).reshape(
        *W.shape[: b.ndim - 1], *W.shape[b.ndim :]
    )
