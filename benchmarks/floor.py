"""The least arithmetic that a sweep can be made of, and how long it takes at the rate of a plain product."""

import math
import time
from typing import Any

import jax
import jax.numpy as jnp

ROWS = 2048  # of a product large enough to run at the machine's rate


def operations(
    config: Any, shape: tuple[int, int], over: tuple[str, ...], site_axes: dict[str, int]
) -> float:
    """Multiplications and additions with weights, of every cell of a sweep of one site.

    A cell of layer l and position p needs the layers l to L - 1, of the last of them keys and values and one position
    of all else, at the positions from p on; from 0 where no position is swept.

    Args:
        config: The model's.
        shape: Of the tokens.
        over: The axes that are swept.
        site_axes: Length of every swept axis but the layer's.
    """
    n_examples, n_pos = shape
    cells = math.prod(site_axes[axis] for axis in over if axis not in ("layer", "pos"))
    matrices = (s for path, s in config.shapes.items() if path.startswith("blocks.") and ".W_" in path)
    block = sum(map(math.prod, matrices)) / config.n_layers
    kv = 2 * config.d_model * config.n_kv_heads * config.d_head
    total = 0.0
    for first in range(n_pos) if "pos" in over else (0,):
        tokens = n_pos - first
        for layer in range(config.n_layers):
            total += (config.n_layers - 1 - layer) * tokens * block + tokens * kv + (block - kv)
    return 2.0 * total * cells * n_examples


def rate(config: Any) -> float:
    """Operations per second of a product of this model's width, the best of ten."""
    x, W = jnp.ones((ROWS, config.d_model)), jnp.ones((config.d_model, config.d_mlp))
    product = jax.jit(lambda x, W: jnp.dot(x, W, precision="highest"))
    jax.block_until_ready(product(x, W))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(product(x, W))
        best = min(best, time.perf_counter() - start)
    return 2 * ROWS * config.d_model * config.d_mlp / best
