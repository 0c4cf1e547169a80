"""Which heads raise the logits of the tokens that they attend to? The other half of an induction head.

    score = sum of eigenvalues of W_E W_V W_O W_U over the sum of their sizes

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits", "Detecting Copying Behavior". The weights of
the norms are folded in first. Weights alone: says what a head would do with a token's embedding, and nothing of what
earlier layers have written there; positive eigenvalues do not force every token's own logit up.
"""

from mechjax.base.meshes import on_any_mesh
from mechjax.heads.scores import HeadScores
from mechjax.models.decoder import Decoder
from mechjax.models.factored import copying_score
from mechjax.models.needs import needs_decoder
from mechjax.models.quantized import full
from mechjax.models.rewrite import fold_norm


@needs_decoder("weights")
@on_any_mesh
def copying(model: Decoder) -> HeadScores:
    """From -1 (suppresses what it sees) through 0 to 1 (copies it), for each head. Costs `d_vocab * d_model^2`.

    Raises:
        UnsupportedModelError: A model whose norms cannot be folded.
    """
    return HeadScores(copying_score(fold_norm(full(model))), "copying")
