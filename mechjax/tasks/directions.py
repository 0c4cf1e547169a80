"""Random directions, pushed apart: more of them than dimensions, nearer to right angles than chance has them.

Steps of Adam lower

    sum over i != j of (w_i . w_j)^2 + n sum_i (|w_i|^2 - 1)^2

whose gradient is 4 (w_i W^T W - |w_i|^2 w_i) + 4 n (|w_i|^2 - 1) w_i: a matrix of `d x d` in place of all pairs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float


def unit(rows: Float[Array, "row d"]) -> Float[Array, "row d"]:
    """Rows of length 1."""
    return rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="steps")
def pushed_apart(
    rows: Float[Array, "row d"], learning_rate: Float[Array, ""] | float, *, steps: int
) -> Float[Array, "row d"]:
    """Unit rows with smaller cosines between them.

    Args:
        rows: Where they begin, of any length but 0.
        learning_rate: Of Adam.
        steps: How many.

    Cost: `4 n d^2` operations a step.
    """
    adam = optax.scale_by_adam()
    dot = partial(jnp.dot, precision="highest")
    rate = jnp.asarray(learning_rate, rows.dtype)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        W, state = carry
        length = jnp.square(W).sum(-1, keepdims=True)
        slope = 4 * (dot(W, dot(W.T, W)) - length * W + len(W) * (length - 1) * W)
        with jax.numpy_dtype_promotion("standard"):
            update, state = adam.update(slope, state)
            update = jnp.asarray(update)
        return (W - rate * update, state), None

    start = unit(rows)
    return unit(lax.scan(step, (start, adam.init(start)), None, steps)[0][0])
