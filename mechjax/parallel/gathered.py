"""Arrays of a mesh as numbers of the host, in every process."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def gathered(x: Any) -> np.ndarray:
    """The whole array on this host. Where processes share it, all of them call this."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))
    return np.asarray(x)
