"""Gradients of the masked forward on the way of a mask, or of parts of it, from 0 to 1."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.attribution.subject import Subject
from mechjax.graph.build import Graph


def sublayers(graph: Graph) -> Int[np.ndarray, " edge"]:
    """The sublayer that each edge leaves: the input, the heads of a layer, its MLP, in the order of nodes."""
    own = [name.partition(".")[0] for name in graph.nodes]  # a layer's heads, or its MLP with units
    of_node = np.cumsum([0, *(one != other for one, other in itertools.pairwise(own))])
    return of_node[graph.table[:, 0]].astype(np.int32)


def slopes_of_mask(
    given: Subject, groups: Int[np.ndarray, " edge"], rule: list[tuple[float, float]]
) -> Float[Array, "1 edge"]:
    """The integral of the mean metric's slope in each edge, while the edges of its group alone go from 0 to 1.

    Args:
        given: The model and its ablation.
        groups: The group of each edge, from 0 up.
        rule: Where between 0 and 1 the slope is read, and with which weight.
    """
    at, weight = np.asarray(rule, given.start.dtype).T
    return _integrals(given, jnp.asarray(groups), jnp.asarray(at), jnp.asarray(weight), int(groups.max()) + 1)


@eqx.filter_jit
def _integrals(given: Subject, groups: Array, at: Array, weight: Array, n_groups: int) -> Array:
    def step(total: Array, x: tuple[Array, Array, Array]) -> tuple[Array, None]:
        group, at, weight = x
        kept = jnp.where(groups == group, at, jnp.ones_like(at))
        return total + jnp.where(
            groups == group, weight * jax.grad(lambda kept: given.masked(kept).mean())(kept), 0
        ), None

    every = jnp.arange(n_groups, dtype=groups.dtype)
    xs = (jnp.repeat(every, len(at)), jnp.tile(at, n_groups), jnp.tile(weight, n_groups))
    return jax.lax.scan(step, jnp.zeros(groups.shape, at.dtype), xs)[0][None]
