"""Write every head's circuits in their own singular directions."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mechjax.base.meshes import on_any_mesh
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder
from mechjax.models.factored import FactoredMatrix
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.fold_value_bias import fold_value_bias
from mechjax.models.rewrite.premises import presume, rebuild, refusal


@needs_decoder("weights")
@on_any_mesh
def refactor_qk_ov(model: Decoder) -> Decoder:
    """Choose the basis inside each head by the singular value decomposition of its QK and OV circuits.

    Only `W_Q W_K^T` and `W_V W_O` matter; how they are cut in two is arbitrary. Afterwards dimensions of a
    head are singular directions, largest first: `W_V = U S`, `W_O = V^T` (rows orthonormal, so that `z` is as
    long as what the head writes), `W_Q = U S^1/2`, `W_K = V S^1/2`. Biases of queries and keys are an extra
    input that is always 1; those of values are folded first (`fold_value_bias`).

    Keeps: logits and every site but `q`, `k`, `v`, `z` (and `result`, where values had biases). Exact up to
    rounding. A head whose factors are in this form already is left as it is, so a second time changes no bit.
    Directions whose singular values are nearly equal are arbitrary among themselves.

    Raises:
        UnsupportedModelError: Something stands between `W_Q` and `W_K` (rotation, norms, clipping, latents),
            heads share keys, or the model has a choice that this was not written for.
    """
    presume(model, "refactor_qk_ov")
    config = model.config
    between = {
        "positions": any(config.ropes), "qk_norm": config.qk_norm != "none", "qkv_clip": config.qkv_clip is not None,
        "latent": config.latent is not None,
    }  # fmt: skip
    if found := [f"`{choice}` = {getattr(config, choice)!r}" for choice, there in between.items() if there]:
        raise refusal(
            "refactor_qk_ov", ", ".join(found),
            "that tells the dimensions of queries and keys apart, so their basis is not free.",
            "Read the circuits without it: `mechjax.models.factored.ov(model).svd()`.",
        )  # fmt: skip
    if config.n_kv_heads != config.n_heads:
        raise refusal(
            "refactor_qk_ov", f"`n_kv_heads` = {config.n_kv_heads} for `n_heads` = {config.n_heads}",
            "heads that share keys have one basis for them, but a circuit each.",
            "Apply `ungroup_kv` first.",
        )  # fmt: skip
    model = fold_value_bias(model)
    params = parameters(model)
    Q, K, V, O = (widened(params[f"blocks.attn.W_{letter}"]) for letter in "QKVO")
    Q, K, V = (W.swapaxes(1, 2) for W in (Q, K, V))  # (layer, head, d_model, d_head)
    if config.qkv_bias:
        Q, K = (
            jnp.concatenate([W, widened(params[f"blocks.attn.b_{letter}"])[..., None, :]], -2)
            for W, letter in ((Q, "Q"), (K, "K"))
        )
    Q, K_T = _in_singular_directions(Q, K.mT, 0.5, model.W_E.dtype)
    V, O = _in_singular_directions(V, O, 1.0, model.W_E.dtype)
    K = K_T.mT
    if config.qkv_bias:
        params |= {"blocks.attn.b_Q": Q[..., -1, :], "blocks.attn.b_K": K[..., -1, :]}
        Q, K = Q[..., :-1, :], K[..., :-1, :]
    params |= {f"blocks.attn.W_{letter}": W.swapaxes(1, 2) for letter, W in (("Q", Q), ("K", K), ("V", V))}
    params["blocks.attn.W_O"] = O
    return rebuild(model, {path: leaf.astype(model.W_E.dtype) for path, leaf in params.items()})


def _in_singular_directions(
    A: Float[Array, "layer head left d_head"],
    B: Float[Array, "layer head d_head right"],
    share: float,
    dtype: Any,
) -> tuple[Float[Array, "layer head left d_head"], Float[Array, "layer head d_head right"]]:
    """`U S^share` and `S^(1 - share) V^T` of each product; heads that are in that form stay as they are."""
    U, S, Vh = FactoredMatrix(A, B).svd()
    left, right = U * (S**share)[..., None, :], Vh * (S ** (1 - share))[..., :, None]
    none = A.shape[-1] - S.shape[-1]  # heads wider than the residual stream have dimensions to spare
    left = jnp.pad(left, [(0, 0), (0, 0), (0, 0), (0, none)])
    right = jnp.pad(right, [(0, 0), (0, 0), (0, none), (0, 0)])
    done = _done(A, B, share, dtype)[..., None, None]
    return jnp.where(done, A, left), jnp.where(done, B, right)


def _done(A: Array, B: Array, share: float, dtype: Any) -> Bool[Array, "layer head"]:
    """Whether dimensions are orthogonal, falling and of the right lengths, as far as `dtype` can tell."""
    tolerance = 4 * float(jnp.finfo(dtype).eps) + 1e-5
    grams = [jnp.matmul(x.mT, x, precision=lax.Precision.HIGHEST) for x in (A, B.mT)]
    a, b = (jnp.diagonal(gram, axis1=-2, axis2=-1) for gram in grams)
    even = share == 0.5
    right = jnp.abs(b - (a if even else 1.0)) <= tolerance * (a.max(-1, keepdims=True) if even else 1.0)
    done = (right | (a == 0)).all(-1) & (jnp.diff(a) <= tolerance * a.max(-1, keepdims=True)).all(-1)
    for gram, squares in zip(grams, (a, b), strict=True):
        beside = jnp.abs(gram - squares[..., None] * jnp.eye(gram.shape[-1]))
        done &= (beside <= tolerance * squares.max(-1)[..., None, None]).all((-2, -1))
    return done
