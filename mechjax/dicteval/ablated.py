"""What probes say once some latents are set to 0: the part that targeted perturbation and removal share.

Setting latents S of a row to 0, what the dictionary misses kept, takes sum_{i in S} f_i W_dec[i] from the row, so it
takes sum_{i in S} f_i (W_dec[i] . w) from a probe's margin: no edited row is formed, and sets of latents are data.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.fit.logistic import Logistic

NUMBERS = (2, 5, 10, 20, 50, 100, 500)
"""How many latents SAEBench ablates."""


def numbers(n: Sequence[int] | None, n_features: int) -> tuple[int, ...]:
    """How many latents are ablated: as asked, or those of `NUMBERS` that there are.

    Raises:
        ArgumentError: None, or more than there are.
    """
    if n is None:
        return tuple(i for i in NUMBERS if i <= n_features) or (n_features,)
    asked = tuple(int(i) for i in n)
    if not asked or not all(1 <= i <= n_features for i in asked):
        raise ArgumentError(
            f"n={list(asked)}: the dictionary has {n_features} latents, so ask for 1 to {n_features} to be ablated."
        )
    return asked


def check_probes(probes: Logistic | None, n: int, width: int, what: str) -> None:
    """Refuse probes of other shapes.

    Raises:
        ShapeError: Not one for each of what is asked, or of another width.
    """
    if probes is not None and (probes.weight.shape != (n, width) or probes.bias.shape != (n,)):
        raise ShapeError(
            f"the probes have weights {probes.weight.shape} and biases {probes.bias.shape}: give ({n}, {width}) and "
            f"({n},), one for each of {what}."
        )


def reads(W_dec: Float[Array, "feature d"], weight: Float[Array, "probe d"]) -> Float[Array, "feature probe"]:
    """What a unit of each latent adds to each probe's margin."""
    return jnp.dot(W_dec.astype(weight.dtype), weight.T, precision=lax.Precision.HIGHEST)


def removed(
    f: Float[Array, "row feature"],
    read: Float[Array, "feature probe"],
    effects: Float[Array, " feature"],
    n: Int[Array, " n"],
) -> Float[Array, "n probe row"]:
    """What is taken from margins by ablating the n latents of largest effect; those without one are left alone."""
    rank = jnp.argsort(jnp.argsort(-effects))

    def one(n: Array) -> Array:
        gone = (rank < n) & (effects > 0)
        return jnp.dot(f, jnp.where(gone[:, None], read, 0), precision=lax.Precision.HIGHEST).T

    return jax.vmap(one)(n)
