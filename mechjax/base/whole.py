"""The numbers of an array on the host, wherever they lie."""

from typing import Any

import jax
import numpy as np


def whole(x: Any, dtype: Any = None) -> np.ndarray:
    """`x` as a NumPy array, of another dtype where one is given.

    Of an array whose parts lie with several processes each gets the whole: all must ask. Cost: its bytes, over the
    network where they are not here. Meant for what is small, such as tokens and scores.
    """
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x, dtype)
