"""Move the biases of values into the bias of what attention writes."""

import jax.numpy as jnp

from mechjax.base.meshes import on_any_mesh
from mechjax.models.contraction import contract, widened
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.premises import presume, rebuild, refusal


@needs_decoder("weights")
@on_any_mesh
def fold_value_bias(model: Decoder) -> Decoder:
    """Fold the values' biases into the output's: `b_O + sum over heads of b_V @ W_O`; afterwards `b_V` is 0.

    Every row of a pattern sums to one, so whatever a head attends to, it writes `b_V @ W_O`: a constant of
    the layer, not of the head. Afterwards what a head writes is what it moved.

    Keeps: logits, and every site but `v`, `z` and `result`. Exact up to one rounding; a second time changes
    no bit. A model without biases of values (one with latent attention has none) comes back as it is; one without
    biases of outputs has them afterwards.

    Raises:
        UnsupportedModelError: Values are clipped, patterns have sinks, or the model has a choice that this was
            not written for.
    """
    presume(model, "fold_value_bias")
    params, config = parameters(model), model.config
    b_V = params.get("blocks.attn.b_V")
    if b_V is None:
        return model
    if "blocks.attn.sinks" in params:
        raise refusal(
            "fold_value_bias", "`attn_sinks` = True", "rows of its patterns sum to less than one.",
            "Leave this step out: the other rewrites do not need it.",
        )  # fmt: skip
    if config.qkv_clip is not None:
        raise refusal(
            "fold_value_bias", f"`qkv_clip` = {config.qkv_clip}", "values are clipped with their biases on.",
            "Leave this step out: the other rewrites do not need it.",
        )  # fmt: skip
    W_O, b_O = params["blocks.attn.W_O"], params.get("blocks.attn.b_O")
    per_head = jnp.repeat(widened(b_V), config.n_heads // config.n_kv_heads, axis=-2)
    written = contract("lhd,lhdm->lm", per_head, widened(W_O), config)
    params["blocks.attn.b_O"] = (written if b_O is None else widened(b_O) + written).astype(W_O.dtype)
    params["blocks.attn.b_V"] = jnp.zeros_like(b_V)
    return rebuild(model, params, out_bias=True)
