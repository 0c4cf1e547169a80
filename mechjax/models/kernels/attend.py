"""Attention whose scores and pattern nobody asks for: by a device's own kernel, or by `fused` where none takes it."""

from jaxtyping import Array, Float

from mechjax.models.config import Config
from mechjax.models.fused import Sides, fused
from mechjax.models.kernels.choice import Asked, kernels_for, placed_by_hand
from mechjax.models.kernels.equations import mixture


def attend(
    q: Float[Array, "*batch query head d_head"],
    k: Float[Array, "*batch key kv_head d_head"],
    v: Float[Array, "*batch key kv_head d_value"],
    sides: Sides,
    sinks: Float[Array, " head"] | None,
    config: Config,
    *,
    causal: bool,
) -> Float[Array, "*batch query head d_value"]:
    """Each head's mixture of values.

    Exact to the rounding of the kernel; what padding reads may differ from device to device. Where a kernel may be
    taken (`choice`), gradients run attention's forward pass again, on every device, and second derivatives use no
    kernel.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        sides: Where queries and keys stand, and the layer's window.
        sinks: Scores of keys that are not there.
        config: The model's.
        causal: Whether the keys are the queries' own tokens, each of which sees those up to it.
    """
    by_hand = any(placed_by_hand(x) for x in (q, k, v))
    kernels = kernels_for(
        Asked(config, q.dtype, q.shape[-3], q.shape[-1], v.shape[-1], causal, sinks is not None, by_hand)
    )
    if not kernels:
        return fused(q, k, v, sides, sinks, config)
    tokens, _, window = sides
    given = {"real": tokens.real, "order": tokens.order, "window": window}
    places = {name: x for name, x in given.items() if x is not None}
    return mixture(q, k, v, places, config, kernels)
