"""Take out of the logits the one direction that softmax cannot see."""

from mechjax.base.meshes import on_any_mesh
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.premises import presume, rebuild, refusal, untied


@needs_decoder("weights")
@on_any_mesh
def center_unembed(model: Decoder) -> Decoder:
    """Subtract from the unembedding and its bias their mean over the vocabulary.

    Softmax is blind to what all logits share. Without it a logit says how much more likely a token becomes
    than the mean token, so that direct logit attribution to single tokens means something.

    Keeps: log-probabilities and differences of logits, not the logits. Exact up to rounding; a second time
    changes it by rounding only. A tied unembedding is untied, because the embedding must stay.

    Raises:
        UnsupportedModelError: Logits are soft-capped, so that what they share matters; or the model has a
        choice that
            this was not written for.
    """
    presume(model, "center_unembed")
    if model.config.final_softcap is not None:
        raise refusal(
            "center_unembed", f"`final_softcap` = {model.config.final_softcap}",
            "what logits share before a soft-cap, they do not share after it.",
            "Subtract the mean of the logits themselves where it disturbs.",
        )  # fmt: skip
    params = parameters(untied(model))
    for path in params.keys() & {"W_U", "b_U"}:
        unembedding = widened(params[path])
        params[path] = (unembedding - unembedding.mean(-1, keepdims=True)).astype(params[path].dtype)
    return rebuild(model, params, tied=False)
