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


def edge_operations(config: Any, n_tokens: int) -> float:
    """Multiplications and additions with weights that exact scores of all edges of heads and MLPs need, of one prompt.

    An edge into a head needs that head's weights of one side and of what it writes, and the MLP; one into an MLP needs
    the MLP; both the later layers, of the last of them keys and values and one position of all else.
    """
    d, L = config.d_model, config.n_layers
    head, mlp, kv = 2 * d * config.d_head, 2 * d * config.d_mlp, 2 * d * config.n_kv_heads * config.d_head
    block = 2 * d * config.n_heads * config.d_head + kv + mlp
    sides, total = config.n_heads + 2 * config.n_kv_heads, 0.0
    for layer in range(L):
        nodes, rest = 1 + layer * (config.n_heads + 1), L - 1 - layer
        after = (rest - 1) * n_tokens * block + n_tokens * kv + block - kv if rest else 0
        here = n_tokens if rest else 1
        total += nodes * sides * ((head + mlp) * here + after) + (nodes + config.n_heads) * (
            mlp * here + after
        )
    return 2.0 * total


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
