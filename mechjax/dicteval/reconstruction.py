"""How well does a dictionary reconstruct, and how do its latents lie?

With e = y - y_hat, sums over all tokens of all batches, means of the whole data (accumulated in float64):

- `fvu`: sum |e|^2 / sum |y - mean y|^2. One minus it is the explained variance.
- `fvu_about_mean`: sum |e - mean e|^2 / sum |y - mean y|^2, which forgives an error that is the same everywhere
  (dictionary_learning reports this one).
- `nmse`: mean of |e|^2 / |y|^2, token by token (Gao et al. 2024), which a mean that is far from 0 makes small.
- `gamma`: sum |y_hat|^2 / sum y . y_hat; below 1 where latents have shrunk (Rajamanoharan et al. 2024,
  arXiv:2404.16014, Eq. 10).
- `l0`: mean number of active latents. `density`: for each latent the part of tokens in which it is active; it is dead
  where that is 0, which says little of fewer than some millions of tokens.

Misleads when: "explained variance" is compared without saying which; these differ by much on the same run.
"""

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.dictionaries import Dictionary


class Reconstruction(Record):
    """What a dictionary makes of data, and how its latents lie.

    Attributes:
        density: For each latent the part of tokens in which it is active.
        fvu: Fraction of variance unexplained, about the data's mean.
        fvu_about_mean: The same with the mean error forgiven.
        nmse: Mean over tokens of the error over the token's size, squared.
        gamma: Size of what is made over what it should be.
        cosine: Mean cosine of what is made and what should be.
        l0: Mean number of active latents.
        dead: Part of latents that are never active.
        tokens: How many were looked at.
    """

    density: Float[Array, "feature"]
    fvu: Float[Array, ""]
    fvu_about_mean: Float[Array, ""]
    nmse: Float[Array, ""]
    gamma: Float[Array, ""]
    cosine: Float[Array, ""]
    l0: Float[Array, ""]
    dead: Float[Array, ""]
    tokens: Int[Array, ""]


@on_any_mesh
def reconstruction(dictionary: Dictionary, batches: Iterable[Any]) -> Reconstruction:
    """Measure a dictionary on data that it was not trained on.

    Args:
        dictionary: The dictionary, as it is used.
        batches: Arrays (batch, d_model), or pairs of what is read and what is to be made of it.

    Raises:
        ArgumentError: No batch, or fewer than two tokens.
        ShapeError: One of another width.
    """
    total, about = None, None
    for batch in batches:
        x, y = batch if isinstance(batch, tuple) else (batch, batch)
        about = (
            jnp.asarray(y).mean(0) if about is None else about
        )  # sums about it lose no digits to the mean's size
        sums = [whole(s, np.float64) for s in _sums(dictionary, jnp.asarray(x), jnp.asarray(y), about)]
        total = sums if total is None else [a + b for a, b in zip(total, sums, strict=True)]
    if total is None or total[0] < 2:
        raise ArgumentError(
            "`batches` holds fewer than two tokens: variance needs two, and many more to mean much."
        )
    n, fired, of_y, of_e, y_sum, e_sum, ratios, made, along, cosines = total
    variance = of_y - np.square(y_sum).sum() / n
    safe = variance if variance > 0 else np.nan
    density = fired / n
    numbers = {
        "density": density,
        "fvu": of_e / safe,
        "fvu_about_mean": (of_e - np.square(e_sum).sum() / n) / safe,
        "nmse": ratios / n,
        "gamma": made / along,
        "cosine": cosines / n,
        "l0": density.sum(),
        "dead": (fired == 0).mean(),
    }
    kept = {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}
    return Reconstruction(**kept, tokens=jnp.asarray(int(n), jnp.int32))


@eqx.filter_jit
def _sums(dictionary: Dictionary, x: Array, y: Array, about: Array) -> tuple[Array, ...]:
    """What is added up over batches."""
    f = dictionary.encode(x)
    made = dictionary.completed(dictionary.decode(f), x)
    e, away = y - made, y - about
    sizes = lambda z: jnp.square(z).sum(-1)
    along = (y * made).sum(-1)
    tiny = jnp.finfo(y.dtype).tiny
    lengths = jnp.sqrt(sizes(y) * sizes(made))
    return (
        jnp.asarray(len(x), jnp.float32),
        (f != 0).sum(0),
        sizes(away).sum(),
        sizes(e).sum(),
        away.sum(0),
        e.sum(0),
        (sizes(e) / jnp.maximum(sizes(y), tiny)).sum(),
        sizes(made).sum(),
        along.sum(),
        (along / jnp.maximum(lengths, tiny)).sum(),
    )
