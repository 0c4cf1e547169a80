"""Which heads look at earlier copies of the same token?

    score = mean over q, where there is such a k, of the sum of pattern[q, k] over k < q with token[k] = token[q]

Wang et al. 2022, arXiv:2211.00593 (duplicate-token heads). A head that looks everywhere scores the share of copies
among the keys: read scores against that of a random model.
"""

from mechjax.base.meshes import on_any_mesh
from mechjax.heads.scores import HeadScores, attention_to
from mechjax.heads.targets import read_tokens, to_duplicates
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.needs import needs_decoder


@needs_decoder("attention")
@on_any_mesh
def duplicate_token(model: Decoder, prompts: Tokens) -> HeadScores:
    """Attention that each head pays to earlier copies of the query's token, mean over the queries that have any.

    Args:
        model: The decoder.
        prompts: Prompts or ids (*batch, pos), such as `repeated_tokens` makes.

    Returns:
        From 0 to 1 for each head.

    Raises:
        ArgumentError: Prompts in which no token occurs twice.
    """
    tokens, mask = read_tokens(model, prompts)
    lack = "no token occurs twice in a prompt"
    return attention_to(model, to_duplicates(tokens, mask), tokens, mask, "duplicate_token", lack)
