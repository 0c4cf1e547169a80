"""Whether what a method of this package measured are numbers, and where in the model they stopped being some."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.graph.writes import writes
from mechjax.models.decoder import Decoder
from mechjax.transform.select import is_concrete


def check_numbers(
    model: Decoder,
    runs: Sequence[Int[Array, "batch pos"]],
    mask: Bool[Array, "batch pos"] | None,
    *found: Float[Array, "..."],
) -> None:
    """Whether metrics are numbers, where that can be seen. Infinite ones are: of impossible answers, for example.

    Args:
        model: The decoder.
        runs: The prompts that it ran.
        mask: True for real tokens.
        found: What was measured.

    Raises:
        ArgumentError: Some are NaN. The first node that is not finite is named, in the runs as they come.
    """
    if not any(is_concrete(x) and bool(jnp.isnan(x).any()) for x in found):
        return
    for ids in runs:
        writes(model, ids, mask=mask)
    raise ArgumentError(
        "some metrics are NaN, though what nodes write is finite in the runs without patches: the metric gives NaN, a "
        "named position is out of range, or the patched run overflows (half precision?)."
    )
