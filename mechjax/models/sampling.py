"""Choosing the next token: the most likely one, or a draw.

Top-k: Fan et al. 2018, arXiv:1805.04833. Top-p (nucleus): Holtzman et al. 2020, arXiv:1904.09751, Eq. 2.

All numbers are data: new ones never recompile. So nothing is sorted: the smallest logit that stays is found bit by bit,
in 32 passes. Tokens that tie with it stay too.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt32


def choose(
    logits: Float[Array, "*batch d_vocab"],
    key: PRNGKeyArray | None = None,
    temperature: Float[Array, ""] | None = None,
    top_k: Int[Array, ""] | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, "*batch"]:
    """One token for each example; -1, which is none, where the logits are NaN.

    Args:
        logits: Of the next token.
        key: Random key; None takes the most likely token.
        temperature: What logits are divided by; 0 takes the most likely token.
        top_k: Only the `top_k` most likely tokens may be drawn.
        top_p: Of these, only the fewest that together have at least this probability, at that temperature.
    """
    logits = logits.astype(jnp.float32)
    scores = logits
    if key is not None and temperature is not None:
        if top_k is not None:
            scores = _kept(scores, lambda stays: stays.sum(-1) >= top_k)
        if top_p is not None:
            cold = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
            p = jax.nn.softmax((scores - scores.max(-1, keepdims=True)) / cold, -1)
            scores = _kept(scores, lambda stays: jnp.where(stays, p, 0.0).sum(-1) >= top_p)
        # The argmax of s + T g, with Gumbel noise g, is a draw from softmax(s / T), and needs no division by T = 0.
        scores = scores + temperature * jax.random.gumbel(key, scores.shape)
    return jnp.where(jnp.isnan(logits).any(-1), -1, scores.argmax(-1).astype(jnp.int32))


def log_probability(
    logits: Float[Array, "*batch d_vocab"], tokens: Int[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """The model's own log-probability of tokens, in float32; NaN for a token that there is not."""
    tokens = jnp.where(tokens < 0, logits.shape[-1], tokens)
    every = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
    return jnp.take_along_axis(every, tokens[..., None], -1, mode="fill", fill_value=jnp.nan)[..., 0]


def _kept(
    scores: Float[Array, "*batch d_vocab"],
    enough: Callable[[Bool[Array, "*batch d_vocab"]], Bool[Array, "*batch"]],
) -> Float[Array, "*batch d_vocab"]:
    """The largest scores, as few as are `enough`; the others become -inf."""
    ordered = _ordered(scores)

    def try_bit(i: Array, least: Array) -> Array:
        higher = least | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        return jnp.where(enough(ordered >= higher[..., None]), higher, least)

    least = lax.fori_loop(0, 32, try_bit, jnp.zeros(scores.shape[:-1], jnp.uint32))
    return jnp.where(ordered >= least[..., None], scores, -jnp.inf)


def _ordered(x: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Floats as integers in the same order."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
