"""What moving one score does through a softmax, the rest linear: the effect of one key on what a pattern mixes.

A row of scores s gives the pattern p = softmax(s), and g is the slope of the metric at p. Where only score k moves,

    effect = (p'_k - p_k) (g_k - mean of g over the others, weighted by p)

exactly, because the others keep their proportions. Scores may be as large as they come: p'_k and p_k are sigmoids of
how far score k lies above the log-sum-exp of the others, which is formed without score k where that is most of the row,
so that nothing is lost where attention saturates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.models.scores import MASKED

Rows = Float[Array, "*rows key"]


def column_effect(scores: Rows, moved: Rows, slopes: Rows) -> Rows:
    """What the metric gains where one score of a row moves, for each in turn."""
    keys = jnp.arange(scores.shape[-1])
    largest = keys == scores.argmax(-1, keepdims=True)  # all others hold at most half of the row
    rest = jnp.where(largest, MASKED, scores)
    share = jnp.minimum(jax.nn.softmax(scores, -1), 0.5)
    mean = (jax.nn.softmax(scores, -1) * slopes).sum(-1, keepdims=True)
    total = jax.nn.logsumexp(scores, -1, keepdims=True)
    beside = jnp.where(largest, jax.nn.logsumexp(rest, -1, keepdims=True), total + jnp.log1p(-share))
    others = jnp.where(
        largest,
        (jax.nn.softmax(rest, -1) * slopes).sum(-1, keepdims=True),
        (mean - share * slopes) / (1 - share),
    )
    return (jax.nn.sigmoid(moved - beside) - jax.nn.sigmoid(scores - beside)) * (slopes - others)


def with_sinks(rows: Rows, sinks: Float[Array, "*layer head"] | None) -> Float[Array, "*rows more"]:
    """Rows, (layer, batch, head, query, key), and what each head gives to no key, as a last column."""
    if sinks is None:
        return rows
    column = jnp.broadcast_to(sinks.astype(rows.dtype)[:, None, :, None, None], (*rows.shape[:-1], 1))
    return jnp.concatenate((rows, column), -1)
