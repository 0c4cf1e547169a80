"""Which latents write alike? The nearest of each, by the cosine of their rows of the decoder.

    cosine(i, j) = W_dec,i . W_dec,j / (|W_dec,i| |W_dec,j|)

Near ones often share a meaning or halve one; two with a cosine near 1 are one latent twice. What they have in common is
said of what they write alone: two may write alike and never be active together.

Reference: Bricken et al. (2023), "Towards monosemanticity", on feature splitting. Cost: features by features, some rows
at a time. Misleads when: rows of different sites are compared, or signs: opposite rows are as far apart as can be.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.dicteval.chosen_latents import chosen_latents, single
from mechjax.dictionaries import Dictionary, Normalized

_AT_ONCE = 256  # rows that are compared with all others at a time


class Neighbours(Record):
    """The nearest latents of each, nearest first.

    Attributes:
        cosine: How near each is.
        nearest: Its number.
        latents: Whose they are.
    """

    cosine: Float[Array, "feature neighbour"]
    nearest: Int[Array, "feature neighbour"]
    latents: Int[Array, "feature"]

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The latents' numbers."""
        return {"feature": tuple(map(str, self.latents.tolist()))}


@on_any_mesh
def neighbours(
    dictionary: Dictionary | Normalized, *, latents: Sequence[int] | None = None, n: int = 5
) -> Neighbours:
    """The latents whose rows of the decoder point most nearly the same way.

    Args:
        dictionary: The dictionary.
        latents: Whose neighbours to look for; None for all.
        n: How many of each; fewer where there are not as many.

    Raises:
        ArgumentError: A latent that there is not, `n` below 1, or a dictionary of several sites.
    """
    rows = single(dictionary).W_dec
    chosen = chosen_latents(dictionary, latents, n=n)
    cosine, nearest = _nearest(rows, jnp.asarray(chosen), min(n, len(rows) - 1))
    return Neighbours(cosine, nearest, jnp.asarray(chosen))


@eqx.filter_jit
def _nearest(rows: Array, chosen: Array, n: int) -> tuple[Array, Array]:
    rows = rows.astype(jnp.float32)
    lengths = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    unit = rows / jnp.where(lengths > 0, lengths, 1)

    def of(i: Int[Array, ""]) -> tuple[Float[Array, " n"], Int[Array, " n"]]:
        cosines = jnp.dot(unit, unit[i], precision=lax.Precision.HIGHEST)
        cosine, nearest = lax.top_k(cosines.at[i].set(-jnp.inf), n)
        return cosine, nearest

    return lax.map(of, chosen, batch_size=min(_AT_ONCE, len(chosen)))
