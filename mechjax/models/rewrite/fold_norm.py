"""Move what norms multiply and add into the matrices that read them."""

import jax.numpy as jnp
from jaxtyping import Array

from mechjax.models.contraction import contract, widened
from mechjax.models.decoder import Decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.premises import presume, rebuild, untied

_ATTENTION = ("blocks.attn.W_Q", "blocks.attn.W_K", "blocks.attn.W_V")
_MLP = ("blocks.mlp.W_in", "blocks.mlp.W_gate")


def fold_norm(model: Decoder) -> Decoder:
    """Fold the scales and biases of the norms into the matrices that read them.

    A norm's output is `x_hat * w + b`, of which a matrix reads `x_hat @ (w * W) + b @ W`. Afterwards every `w` is
    1 (0 where `norm_offset` adds the 1) and every `b` is 0, so that rows of `W_Q`, `W_in`, `W_U` are directions
    of the normalised residual stream itself and heads of different layers can be compared. `ln1.normalized` and
    its like become `x_hat`. Norms of which no matrix reads the output stay: those on what is written, on
    queries and keys, and on embeddings.

    Keeps: logits, and every site but the outputs of norms. Exact up to one rounding of each weight; a second
    time changes no bit. Where norms have biases, the matrices that read them have biases afterwards; a tied
    unembedding is untied, because `ln_final` acts on one side only, which costs `d_vocab * d_model` numbers.

    Raises:
        UnsupportedModelError: The model has a choice that this was not written for.
    """
    presume(model, "fold_norm")
    config = model.config
    params = parameters(untied(model))
    shared = config.residual == "parallel_shared"
    readers = {
        "blocks.ln1": _ATTENTION + _MLP if shared else _ATTENTION,
        "blocks.ln2": _MLP,
        "ln_final": ("W_U",),
    }
    for norm, matrices in readers.items():
        w, b = params.get(f"{norm}.w"), params.get(f"{norm}.b")
        for path in matrices:
            if path not in params:
                continue
            W = params[path]
            if b is not None:
                read, bias = _times(widened(b), widened(W), model), path.replace("W_", "b_")
                params[bias] = (read if bias not in params else widened(params[bias]) + read).astype(W.dtype)
            if w is not None:
                scale = widened(w) + config.norm_offset
                params[path] = (widened(W) * scale.reshape(*w.shape, *[1] * (W.ndim - w.ndim))).astype(
                    W.dtype
                )
        if w is not None:
            params[f"{norm}.w"] = jnp.full_like(w, 1 - config.norm_offset)
        if b is not None:
            params[f"{norm}.b"] = jnp.zeros_like(b)
    biases = {"qkv_bias": "blocks.attn.b_Q", "mlp_bias": "blocks.mlp.b_in", "unembed_bias": "b_U"}
    return rebuild(model, params, tied=False, **{choice: path in params for choice, path in biases.items()})


def _times(b: Array, W: Array, model: Decoder) -> Array:
    """`b @ W` of every layer, whatever axes the matrix writes to."""
    flat = W.reshape(*b.shape, -1)
    return contract("...m,...mo->...o", b, flat, model.config).reshape(
        *W.shape[: b.ndim - 1], *W.shape[b.ndim :]
    )
