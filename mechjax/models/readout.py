"""Logits at chosen positions and tokens only: what a metric reads of a final residual stream."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, scaled


def readout(
    model: Decoder,
    resid: Float[Array, "*batch pos d_model"],
    at: Int[Array, "*batch"],
    tokens: Int[Array, "*batch k"] | None = None,
) -> Float[Array, "*batch token"]:
    """`model.unembed(resid)` at one position per example and, where given, for some tokens only.

    Equal to the full unembedding there; costs `k` columns in place of `pos * d_vocab`. It forms no sites.

    Args:
        model: The decoder.
        resid: The residual stream leaving the last block.
        at: The position read in each example; past the end reads NaN.
        tokens: Token ids read in each example; None for the whole vocabulary.
    """
    config = model.config
    at = jnp.where(at < 0, resid.shape[-2], at)  # "fill" fills past the end, but wraps below zero
    read = jnp.take_along_axis(resid, at[..., None, None], -2, mode="fill", fill_value=jnp.nan)[..., 0, :]
    normalized = read if model.ln_final is None else model.ln_final(read, config)
    if tokens is None:
        spec, table = ("...m,vm->...v", model.W_E) if model.W_U is None else ("...m,mv->...v", model.W_U)
        logits = contract(spec, normalized, table, config)
        bias = model.b_U
    else:
        tokens = jnp.where(tokens < 0, config.d_vocab, tokens)
        if model.W_U is None:
            columns = jnp.take(model.W_E, tokens, axis=0, mode="fill", fill_value=jnp.nan)
        else:
            columns = jnp.moveaxis(
                jnp.take(model.W_U, tokens, axis=1, mode="fill", fill_value=jnp.nan), 0, -1
            )
        logits = contract("...m,...km->...k", normalized, columns, config)
        bias = None if model.b_U is None else jnp.take(model.b_U, tokens, mode="fill", fill_value=jnp.nan)
    if bias is not None:
        logits = logits + bias
    return scaled(logits, config)
