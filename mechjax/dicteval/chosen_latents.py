"""Which latents of a dictionary are asked for, and whether it is one that they can be asked of."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries import Dictionary, Normalized


def single(dictionary: Any) -> Dictionary:
    """The dictionary of one site, in what normalises its tokens or not.

    Raises:
        ArgumentError: One of several sites or layers, or several stacked.
    """
    inner = dictionary.dictionary if isinstance(dictionary, Normalized) else dictionary
    if not isinstance(inner, Dictionary) or len(inner.reads) != 1 or inner.W_dec.ndim != 2:
        raise ArgumentError(
            f"this {type(dictionary).__name__} has no one row of the decoder for each latent: it is of several sites, "
            "or several dictionaries stacked. Take one: `jax.tree.map(lambda x: x[i], dictionary)`."
        )
    return inner


def chosen_latents(
    dictionary: Any, latents: Sequence[int] | None, **counts: int
) -> Int[np.ndarray, " feature"]:
    """Numbers of latents, None for all; and whether counts, by name, are 1 or more.

    Raises:
        ArgumentError: A latent that there is not, none at all, or a count that is too small.
    """
    few = {name: count for name, count in counts.items() if count < 1}
    if few:
        name, count = next(iter(few.items()))
        raise ArgumentError(f"{name}={count}: it must be 1 or more.")
    total = single(dictionary).n_features
    chosen = np.arange(total) if latents is None else np.asarray(latents)
    if chosen.ndim != 1 or not len(chosen) or chosen.dtype.kind not in "iu":
        raise ArgumentError(
            f"latents={latents!r}: a list of one or more whole numbers was expected, or None for all {total}."
        )
    if outside := [int(i) for i in chosen if not 0 <= i < total]:
        raise ArgumentError(
            f"latents has {outside[0]}; this dictionary has {total} latents, 0 to {total - 1}."
        )
    return chosen.astype(np.int32)
