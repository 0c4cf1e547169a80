"""Which heads look one token back? They let a key know its predecessor, as induction needs.

    score = mean over queries q of pattern[q, q - 1]

Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the measure is that of Olsson et al. 2022,
arXiv:2209.11895. On natural text it also counts heads that look back for other reasons; on random tokens they cannot.
"""

from mechjax.base.meshes import on_any_mesh
from mechjax.heads.scores import HeadScores, attention_to
from mechjax.heads.targets import read_tokens, to_previous
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.needs import needs_decoder


@needs_decoder("attention")
@on_any_mesh
def previous_token(model: Decoder, prompts: Tokens) -> HeadScores:
    """Attention that each head pays to the token just before, mean over all tokens but the first of each prompt.

    Args:
        model: The decoder.
        prompts: Prompts or ids (*batch, pos), such as `repeated_tokens` makes.

    Returns:
        From 0 to 1 for each head.

    Raises:
        ArgumentError: Prompts of one token.
    """
    tokens, mask = read_tokens(model, prompts)
    lack = "every prompt has one token only"
    return attention_to(model, to_previous(tokens, mask), tokens, mask, "previous_token", lack)
