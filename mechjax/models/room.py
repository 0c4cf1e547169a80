"""How many runs fit in some memory: what sweeps take at once."""

import math

from mechjax.models.decoder import Decoder


def runs_that_fit(
    n_bytes: float, model: Decoder, shape: tuple[int, ...], *, heads_apart: bool = False
) -> int:
    """Runs whose activations fit in `n_bytes`, at least one: the widest arrays of a block, twice (in and out).

    Args:
        n_bytes: The memory.
        model: The decoder.
        shape: That of the tokens of one run, (*batch, pos).
        heads_apart: Whether every head reads a stream of its own.
    """
    c, n_tokens = model.config, math.prod(shape)
    streams = 3 + c.n_heads * heads_apart
    per_token = 2 * (c.d_mlp + streams * c.d_model + c.n_heads * (c.d_head + 2 * shape[-1]))
    return max(1, int(n_bytes / (per_token * n_tokens * model.W_E.dtype.itemsize)))
