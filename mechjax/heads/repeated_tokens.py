"""Random tokens, repeated: only their repetition can be known (Olsson et al. 2022, arXiv:2209.11895)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.prompts import Prompts
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder


@needs_decoder("tokens")
def repeated_tokens(
    model: Decoder,
    *,
    key: Key[Array, ""],
    n: int = 16,
    period: int = 25,
    times: int = 2,
    bos: int | None = None,
    ids: Sequence[int] | None = None,
) -> Prompts:
    """`n` prompts of `period` random tokens, said `times` times.

    Args:
        model: The decoder that they are for.
        key: Of the draw; the same key gives the same prompts.
        n: Number of prompts.
        period: Tokens until the repetition; they differ from each other where there are as many to draw from.
        times: How often they are said.
        bos: A token to put in front, or None.
        ids: The tokens to draw from; None for all but `bos`. (Special tokens and unused ids are seldom meant.)

    Raises:
        ArgumentError: Nothing to draw from, or prompts longer than the model's positions.
    """
    config = model.config
    pool = [i for i in (range(config.d_vocab) if ids is None else ids) if i != bos]
    if not pool or min(pool) < 0 or max(pool) >= config.d_vocab:
        raise ArgumentError(
            f"ids={pool[:5]}...: draw from at least one of the model's tokens, 0 to {config.d_vocab - 1}."
        )
    length = period * times + (bos is not None)
    if min(n, period) < 1 or times < 2:
        raise ArgumentError(f"n={n}, period={period}, times={times}: at least 1, 1 and 2.")
    if config.positions == "learned" and length > config.n_ctx:
        raise ArgumentError(
            f"period={period}, said {times} times, makes {length} tokens; the model has {config.n_ctx} positions. Ask "
            f"for period={(config.n_ctx - (bos is not None)) // times} at most."
        )
    draw = lambda key: jax.random.choice(
        key, jnp.array(pool, jnp.int32), (period,), replace=len(pool) < period
    )
    tokens = jnp.tile(jax.vmap(draw)(jax.random.split(key, n)), (1, times))
    if bos is not None:
        tokens = jnp.concatenate([jnp.full((n, 1), bos, jnp.int32), tokens], 1)
    return Prompts(tokens, jnp.ones(tokens.shape, bool))
