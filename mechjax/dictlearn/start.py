"""Where training begins: the size of the data, and biases that stand in their middle."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mechjax.dictionaries import Dictionary
from mechjax.dictionaries.products import at_least_float32, product

ROUNDS = 100  # of Weiszfeld's iteration: more change nothing that float32 shows
NEAR = 1e-6  # of the typical distance, below which a point pulls no harder


@jax.jit
def root_mean_square(x: Float[Array, "*batch d"]) -> Float[Array, ""]:
    """The square root of the mean square of all numbers."""
    return jnp.sqrt(jnp.square(x.astype(at_least_float32(x.dtype))).mean())


@jax.jit
def geometric_median(x: Float[Array, "token d"]) -> Float[Array, " d"]:
    """The point whose distances from all tokens have the smallest sum (Weiszfeld 1937).

    Unlike the mean it is not drawn to a few tokens of great norm, which residual streams have.
    """
    least = (
        NEAR * jnp.linalg.norm(x - x.mean(0), axis=-1).mean() + jnp.finfo(x.dtype).eps
    )  # as large where all are one

    def nearer(_: Any, middle: Array) -> Array:
        pull = 1 / jnp.maximum(jnp.linalg.norm(x - middle, axis=-1), least)
        return (pull[:, None] * x).sum(0) / pull.sum()

    return lax.fori_loop(0, ROUNDS, nearer, x.mean(0))


def begin(
    dictionary: Dictionary, x: Any, y: Any | None, *, normalize: bool, centre: bool
) -> tuple[Float[Array, "2"], Dictionary]:
    """What inputs and outputs are divided by, and the dictionary in that measure, its biases in the middle.

    Args:
        dictionary: The one that is given.
        x: What the first batches read. Shape (*batch, d_model).
        y: What is to be made of it; None where that is the same.
        normalize: Whether to divide by the root mean square.
        centre: Whether to set biases.
    """
    flat = lambda z: jnp.asarray(z).reshape(-1, z.shape[-1])
    read, target = flat(x), flat(x if y is None else y)
    fine = jnp.isfinite(read).all(-1) & jnp.isfinite(target).all(-1)
    if not bool(fine.all()):  # what is not finite is met again, and told, at its step
        read, target = read[fine], target[fine]
    scale = jnp.ones(2)
    if not len(read):
        return scale, dictionary
    if normalize:
        sizes = [root_mean_square(read), root_mean_square(target)]
        scale = jnp.where(jnp.stack(sizes) > 0, jnp.stack(sizes), 1)
    if centre:
        dictionary = centred(dictionary, read / scale[0], None if y is None else target / scale[1])
    return scale, dictionary


def centred(dictionary: Dictionary, x: Array, y: Array | None) -> Dictionary:
    """The dictionary with biases at the data's middle.

    An autoencoder that takes `b_dec` from its input gets the geometric median; a transcoder the mean of its target, and
    an encoder that is 0 at the mean of what it reads; another autoencoder stays as it is (April 2024 update).
    """
    if y is not None:
        b_enc = -product(x.mean(0), dictionary.W_enc)
        return eqx.tree_at(lambda d: [d.b_dec, d.b_enc], dictionary, [y.mean(0), b_enc])
    if dictionary.centred:
        return eqx.tree_at(lambda d: d.b_dec, dictionary, geometric_median(x))
    return dictionary
