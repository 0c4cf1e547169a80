"""Where training begins: the size of the data, and biases that stand in their middle."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from mechjax.dictionaries import Crosscoder, Dictionary
from mechjax.dictionaries.products import at_least_float32, product
from mechjax.dictlearn.loop import sides

ROUNDS = 100  # of Weiszfeld's iteration: more change nothing that float32 shows
NEAR = 1e-6  # of the typical distance, below which a point pulls no harder


@jax.jit
def root_mean_square(x: Float[Array, "token *site d"]) -> Float[Array, "*site"]:
    """The square root of the mean square of all numbers of a site."""
    return jnp.sqrt(jnp.square(x.astype(at_least_float32(x.dtype))).mean((0, -1)))


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
    dictionary: Dictionary | Crosscoder, x: Any, y: Any | None, *, normalize: bool, centre: bool
) -> tuple[Float[Array, "2 *site"], Dictionary]:
    """What inputs and outputs are divided by, each site by itself, and what is trained in that measure, centred.

    Args:
        dictionary: The one that is given.
        x: What the first batches read. Shape (*batch, *site, d_model).
        y: What is to be made of it; None where that is the same.
        normalize: Whether to divide by the root mean square.
        centre: Whether to set biases.
    """
    token = lambda z, shape: jnp.asarray(z).reshape(-1, *shape)
    read = token(x, dictionary.reads)
    target = read if y is None else token(y, dictionary.writes)
    fine = _finite(read) & _finite(target)
    if not bool(fine.all()):  # what is not finite is met again, and told, at its step
        read, target = read[fine], target[fine]
    held, scale = dictionary.trained, jnp.ones((2, *dictionary.reads[:-1]))
    if not len(read):
        return scale, held
    if normalize:
        sizes = jnp.stack([root_mean_square(read), root_mean_square(target)])
        scale = jnp.where(sizes > 0, sizes, 1)
    if centre:
        held = centred(held, *sides(read, None if y is None else target, scale, held), y is not None)
    return scale, held


def _finite(z: Array) -> Array:
    return jnp.isfinite(z).reshape(len(z), -1).all(-1)


def centred(dictionary: Dictionary, x: Array, y: Array, transcodes: bool) -> Dictionary:
    """The dictionary with biases at the data's middle.

    An autoencoder that takes `b_dec` from its input gets the geometric median; a transcoder the mean of its target, and
    an encoder that is 0 at the mean of what it reads; another autoencoder stays as it is (April 2024 update).
    """
    if transcodes and dictionary.W_enc is not None:
        of = product if x.ndim == 2 else jax.vmap(product)
        b_enc = -of(x.mean(0), dictionary.W_enc)
        return eqx.tree_at(lambda d: [d.b_dec, d.b_enc], dictionary, [y.mean(0), b_enc])
    if dictionary.centred:
        return eqx.tree_at(lambda d: d.b_dec, dictionary, geometric_median(x))
    return dictionary
