"""Take out of what is written to the residual stream the one direction that LayerNorm cannot see."""

from mechjax.base.meshes import on_any_mesh
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.premises import presume, rebuild, refusal, untied

_WRITERS = (
    "W_E", "W_pos", "blocks.attn.W_O", "blocks.attn.b_O", "blocks.mlp.W_out", "blocks.mlp.b_out", "blocks.moe.W_out",
    "blocks.moe.b_out", "blocks.moe.shared.W_out",
)  # fmt: skip
"""What is written to the residual stream, by its last axis; experts' weights only multiply it."""
_LEAVE = "Leave this step out: the other rewrites do not need it."


@needs_decoder("weights")
@on_any_mesh
def center_writing(model: Decoder) -> Decoder:
    """Subtract from everything that is written to the residual stream its mean over `d_model`.

    LayerNorm subtracts that mean from whatever it reads, and nothing else reads the stream, so it is
    arbitrary. Without it, norms and cosines of residual streams count only what the model can see.

    Keeps: logits, and every site that is not in the residual stream itself; those differ by a multiple of the
    vector of ones. Exact up to rounding; a second time changes it by rounding only. A tied unembedding is
    untied, because it must not be centered with the embedding.

    Raises:
        UnsupportedModelError: The norms are not LayerNorms, so that the mean is seen; norms write to the
            stream; or the model has a choice that this was not written for.
    """
    presume(model, "center_writing")
    config = model.config
    if config.norm != "layer" or config.norms == "none":
        found = f"`norms` = {config.norms!r}" if config.norms == "none" else f"`norm` = {config.norm!r}"
        raise refusal(
            "center_writing", found,
            "only LayerNorm is blind to the mean of what it reads.", _LEAVE,
        )  # fmt: skip
    if config.norms != "pre" or config.embed_norm:
        which = "`embed_norm` = True" if config.norms == "pre" else f"`norms` = {config.norms!r}"
        raise refusal(
            "center_writing", which,
            "what a norm writes to the residual stream has the mean that it has, whatever the weights before it.",
            _LEAVE,
        )  # fmt: skip
    params = parameters(untied(model))
    for path in params.keys() & _WRITERS:
        written = widened(params[path])
        params[path] = (written - written.mean(-1, keepdims=True)).astype(params[path].dtype)
    return rebuild(model, params, tied=False)
