"""How well margins tell a class from the rest: accuracy, F1 and the area under the ROC curve, of weighted rows."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Classified(eqx.Module):
    """Measures of one probe or many.

    Attributes:
        accuracy: Part of rows on the right side.
        f1: Harmonic mean of precision and recall; 0 where nothing is found.
        auroc: Chance that a row of the class has the larger margin of two, ties counted half.
    """

    accuracy: Float[Array, "*probe"]
    f1: Float[Array, "*probe"]
    auroc: Float[Array, "*probe"]


def classified(
    margins: Float[Array, " row"], y: Bool[Array, " row"], weights: Float[Array, " row"]
) -> Classified:
    """Measures of one probe's margins; `vmap` it over more. Rows of weight 0 count nowhere."""
    said = margins > 0
    total = lambda rows: jnp.where(rows, weights, 0).sum()
    found, of_class, of_rest = total(said & y), total(y), total(~y)
    f1 = 2 * found / (total(said) + of_class)
    order = jnp.argsort(margins)
    sorted_margins, rest = margins[order], jnp.where(y, 0, weights)[order]
    below = jnp.concatenate([jnp.zeros_like(rest[:1]), jnp.cumsum(rest)])
    ends = [below[jnp.searchsorted(sorted_margins, margins, side=side)] for side in ("left", "right")]
    auroc = (jnp.where(y, weights, 0) * (ends[0] + ends[1])).sum() / (2 * of_class * of_rest)
    return Classified(accuracy(margins, y, weights), f1, auroc)


def accuracy(
    margins: Float[Array, "*#many row"], y: Bool[Array, "*#many row"], weights: Float[Array, "*#many row"]
) -> Array:
    """Part of rows on the right side, for all that the arrays have before rows."""
    return 1 - jnp.where((margins > 0) == y, 0, weights).sum(-1) / weights.sum(-1)


every = jax.vmap(jax.vmap(classified, in_axes=(0, 0, 0)), in_axes=(0, None, None))
"""Measures of margins (probe, class, row) with `y` and `weights` (class, row)."""
