"""Forests of features: a child is there only where its parent is, and never together with a sibling.

Features are numbered level by level: roots first, then the children of the first root, of the second and so on, then
theirs; features after the last level belong to no tree. So each level is a run of features, and the children of one
parent stand side by side.

A child that is drawn goes where its parent does not stand. So that it still comes about as often as it should, it is
drawn more often (`compensated`), with p what it should be and siblings those with the same parent:

    p_child / p_parent * (1 + sum of the siblings' p / p_parent), at most 1

This undoes what the parent takes, and nearly what siblings take from each other; where it meets 1, it does not, and
the child comes about less often than it should.

Reference: Chanin and Garriga-Alonso (2026), "SynthSAEBench", arXiv:2602.14687; the forest is that of SAELens 6.54
(`HierarchyConfig` with all parents exclusive, probabilities compensated and children scaled by their parents).
"""

from itertools import pairwise

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Forest(eqx.Module):
    """Trees of one shape.

    Attributes:
        roots: How many trees (static).
        branching: Children of each parent (static).
        depth: Levels below the roots (static).
    """

    roots: int = eqx.field(static=True)
    branching: int = eqx.field(static=True)
    depth: int = eqx.field(static=True)

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """The first feature of each level, and the one after its last."""
        bounds, start, size = [], 0, self.roots
        for _ in range(self.depth + 1):
            bounds.append((start, start + size))
            start, size = start + size, size * self.branching
        return tuple(bounds)

    @property
    def n_parents(self) -> int:
        """How many features have children."""
        return self.levels[-1][0]

    @property
    def n_features(self) -> int:
        """How many features stand in trees."""
        return self.levels[-1][1]

    def parents(self, n_features: int) -> Int[np.ndarray, "known"]:
        """The parent of each feature; -1 for roots and for features outside of trees."""
        parents = np.full(n_features, -1)
        for (start, _), (first, last) in zip(self.levels, self.levels[1:], strict=False):
            parents[first:last] = start + np.arange(last - first) // self.branching
        return parents

    def compensated(self, chance: Float[np.ndarray, "known"]) -> Float[np.ndarray, "known"]:
        """How often each feature is to be drawn for it to come about nearly as often as `chance` says."""
        parents = self.parents(len(chance))
        children = parents >= 0
        family = np.bincount(parents[children], chance[children], minlength=len(chance))
        above = chance[parents[children]]
        others = family[parents[children]] - chance[children]
        drawn = chance.copy()
        drawn[children] = chance[children] / above * (1 + others / above)
        return np.minimum(drawn, 1)


def grown(
    sizes: Float[Array, "batch known"],
    choices: Float[Array, "batch parent"],
    mean: Float[Array, "known"],
    forest: Forest,
) -> Float[Array, "batch known"]:
    """What is left of features that were drawn each by itself.

    Level by level: of siblings that were drawn one stays, each with the same chance; it is multiplied by its parent's
    size over the parent's mean size, so by 0 where the parent is not there.

    Args:
        sizes: Of each feature, 0 where it was not drawn.
        choices: For each feature that has children a number at random in 0 to 1, 1 left out.
        mean: Mean sizes of features that are there.
        forest: The trees.
    """
    levels, n = forest.levels, len(sizes)
    above = sizes[:, : forest.roots]
    kept = [above]
    for (start, end), (first, last) in pairwise(levels):
        siblings = sizes[:, first:last].reshape(n, -1, forest.branching)
        there = siblings > 0
        place = jnp.cumsum(there, -1, dtype=jnp.int32)  # among those that were drawn, from 1
        chosen = 1 + (choices[:, start:end] * place[..., -1].astype(choices.dtype)).astype(jnp.int32)
        stays = there & (place == chosen[..., None])
        times = above / mean[start:end]
        above = jnp.where(stays, siblings * times[..., None], 0).reshape(n, -1)
        kept.append(above)
    return jnp.concatenate([*kept, sizes[:, forest.n_features :]], 1)
