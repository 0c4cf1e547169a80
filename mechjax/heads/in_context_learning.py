"""How much better does the model predict late tokens than early ones? The in-context learning score.

    score = mean loss of the token at `late` - mean loss of the token at `early`

Olsson et al. 2022, arXiv:2209.11895 (there 500 and 50, on natural text, about -0.4 nats). Negative means that context
helps. Misleads where late tokens are easier by themselves, so compare models on one set of prompts.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.heads.targets import read_tokens
from mechjax.models.decoder import Decoder, Tokens
from mechjax.models.needs import needs_decoder
from mechjax.transform.select import is_concrete


class InContextLearning(Record):
    """Loss by position.

    Attributes:
        losses: Mean loss of the token at each position, in nats, over the prompts that have one; NaN at the first.
            Shape (pos).
        score: Mean loss at `late` less mean loss at `early`.
        early: The early position (static).
        late: The late position (static).
    """

    losses: Float[Array, " pos"]
    score: Float[Array, ""]
    early: int = eqx.field(static=True)
    late: int = eqx.field(static=True)


@needs_decoder("tokens")
@on_any_mesh
def in_context_learning(
    model: Decoder, prompts: Tokens, *, early: int = 50, late: int = 500
) -> InContextLearning:
    """The score, and the loss at every position.

    Args:
        model: The decoder.
        prompts: Prompts or ids (*batch, pos).
        early: Position of the early token, counted in real tokens from 0 (which nothing predicts).
        late: Position of the late token.

    Raises:
        ArgumentError: Positions that some prompt does not have.
    """
    tokens, mask = read_tokens(model, prompts)
    shortest = int(whole(mask.sum(-1)).min()) if is_concrete(mask) else tokens.shape[-1]
    if not 1 <= early < late < shortest:
        raise ArgumentError(
            f"early={early}, late={late}: the shortest prompt has {shortest} tokens, so 1 <= early < late < it. "
            "Give longer prompts or nearer positions."
        )
    return _measured(model, tokens, mask, early, late)


@eqx.filter_jit
def _measured(model: Decoder, tokens: Array, mask: Array, early: int, late: int) -> InContextLearning:
    n_pos = tokens.shape[-1]
    # Real tokens moved to the front, so that columns are positions and neighbours are neighbours.
    order = jnp.argsort(~mask, -1, stable=True)
    logits = jnp.take_along_axis(model(tokens, mask=mask), order[..., None], -2).astype(jnp.float32)
    tokens, mask = (jnp.take_along_axis(x, order, -1) for x in (tokens, mask))
    said = jnp.take_along_axis(jax.nn.log_softmax(logits[..., :-1, :], -1), tokens[..., 1:, None], -1)[..., 0]
    real = mask[..., 1:].reshape(-1, n_pos - 1)
    total = jnp.where(real, -said.reshape(-1, n_pos - 1), 0.0).sum(0)
    losses = jnp.concatenate([jnp.full(1, jnp.nan), total / real.sum(0).astype(total.dtype)])
    return InContextLearning(losses, losses[late] - losses[early], early, late)
