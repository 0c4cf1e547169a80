"""Which heads look at what came next the last time? Prefix matching, the attention half of an induction head.

    score = mean over q, where there is such a k, of the sum of pattern[q, k + 1] over k < q with token[k] = token[q]

Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv:2209.11895 (prefix-matching score, taken on
repeated random tokens: there, no head can know the place by anything but the repetition). `copying` is the other half.
"""

from mechjax.base.meshes import on_any_mesh
from mechjax.heads.scores import HeadScores, attention_to
from mechjax.heads.targets import after_duplicates, read_tokens
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.needs import needs_decoder


@needs_decoder("attention")
@on_any_mesh
def induction(model: Decoder, prompts: Tokens) -> HeadScores:
    """Attention that each head pays to tokens that came just after an earlier copy of the query's token.

    Args:
        model: The decoder.
        prompts: Prompts or ids (*batch, pos), such as `repeated_tokens` makes.

    Returns:
        From 0 to 1 for each head: the mean over the queries whose token occurred before.

    Raises:
        ArgumentError: Prompts in which no token occurs twice.
    """
    tokens, mask = read_tokens(model, prompts)
    lack = "no token occurs twice in a prompt"
    return attention_to(model, after_duplicates(tokens, mask), tokens, mask, "induction", lack)
