"""Windows of layers around each layer, cut off at both ends of the model."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from mechjax.base.errors import ArgumentError


def windows(width: int, n_layers: int) -> Bool[Array, "center layer"]:
    """Which layers the window around each layer holds: from `center - width // 2`, `width` of them, where there are.

    Raises:
        ArgumentError: A width below 1, or above the number of layers.
    """
    if not 1 <= width <= n_layers:
        raise ArgumentError(
            f"window={width}: a window holds 1 to {n_layers} layers of this model. Each is centred on a layer and cut "
            "off at the ends."
        )
    layers = np.arange(n_layers)
    start = layers[:, None] - width // 2
    return jnp.asarray((layers >= start) & (layers < start + width))
