"""A world whose features are known: sparse, of unequal frequency, correlated, in a hierarchy, in superposition.

A sample is

    x = sum over features i of a_i features_i + bias

with `a` drawn in four steps:

1. Correlated draws: g = factor z + sqrt(1 - |factor_i|^2) e, with z and e normal, so g_i is normal and g_i, g_j have
   the correlation factor_i . factor_j. Feature i is drawn where g_i is above the quantile that it passes with
   `chance_i`.
2. Sizes: of those drawn max(mean_i + spread_i e', 0).
3. Hierarchy (`mechjax.tasks.hierarchy`): one of siblings that were drawn stays, at random, and is multiplied by its
   parent's size over the parent's mean; so it is 0 where the parent is.
4. x as above.

`synth_sae_bench` is the world of SynthSAEBench-16k: 16,384 unit features in 768 dimensions, pushed apart; of the i-th
the wanted frequency goes as 1 / sqrt(i), from 0.4 down to 0.0005; 128 trees of 1 + 4 + 16 + 64 features and 5,504
features outside of them; mean sizes from 5 to 4, spreads |N(0.5, 0.5)|; factors N(0, 0.1) of rank 25; a bias of length
0.5. About 34 features are active in a sample.

Reference: Chanin and Garriga-Alonso (2026), "SynthSAEBench: evaluating sparse autoencoders on scalable realistic
synthetic data", arXiv:2602.14687; the second version, whose children are scaled by their parents. Differs in the random
numbers alone: the same law, other draws, so scores agree within the spread over worlds and not bit by bit.

Cost: of a sample about two random numbers for each feature, whether it is active or not, and `2 n d` operations.
Misleads when: a score is carried over to real activations, where what a feature is is not known.
"""

from functools import partial
from math import sqrt

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.tasks.directions import pushed_apart, unit
from mechjax.tasks.hierarchy import Forest, grown

SCALES = (1, 1 / 4, 1 / 16, 1 / 64)
N_FEATURES, D_MODEL, ROOTS = 16_384, 768, 128
MOST, LEAST = 0.4, 5e-4  # wanted frequencies
RANK = 25
OWN = 0.01  # the part of each draw's variance that no other shares, at least
STEPS, RATE = 100, 3e-4  # of pushing features apart


class World(Record):
    """Features and how samples are made of them.

    Attributes:
        features: Their directions.
        bias: What is added to every sample.
        chance: How often each feature is drawn, before the hierarchy.
        mean: Mean size of each where it is drawn.
        spread: Standard deviation of that.
        factor: What draws have in common.
        forest: The trees; None for none.
    """

    features: Float[Array, "known d_model"]
    bias: Float[Array, "d_model"]
    chance: Float[Array, "known"]
    mean: Float[Array, "known"]
    spread: Float[Array, "known"]
    factor: Float[Array, "known rank"]
    forest: Forest | None

    def sample(
        self, key: Key[Array, ""] | Array, n: int
    ) -> tuple[Float[Array, "batch d_model"], Float[Array, "batch known"]]:
        """Samples, and which features they hold, by how much.

        Args:
            key: Draws them.
            n: How many; another number is another program.

        Returns:
            What a dictionary reads, and the activations that it is made of.
        """
        return _sampled(self, key, n)


@eqx.filter_jit
def _sampled(world: World, key: Array, n: int) -> tuple[Array, Array]:
    """The four steps."""
    known, dtype = len(world.chance), world.features.dtype
    dot = partial(jnp.dot, precision="highest")
    shared, own, sizes, ties = jax.random.split(key, 4)
    common = dot(jax.random.normal(shared, (n, world.factor.shape[1]), dtype), world.factor.T)
    alone = jnp.sqrt(1 - jnp.square(world.factor).sum(-1))
    drawn = common + alone * jax.random.normal(own, (n, known), dtype) > -ndtri(world.chance)
    size = jax.nn.relu(world.mean + world.spread * jax.random.normal(sizes, (n, known), dtype))
    a = jnp.where(drawn, size, 0)
    if world.forest is not None:
        choices = jax.random.uniform(ties, (n, world.forest.n_parents), dtype)
        a = grown(a, choices, world.mean, world.forest)
    return dot(a, world.features) + world.bias, a


def synth_sae_bench(
    key: Key[Array, ""] | Array,
    *,
    scale: float = 1,
    d_model: int | None = None,
    correlation: float = 0.1,
    hierarchy: bool = True,
) -> World:
    """The world of SynthSAEBench-16k, or a smaller one of the same law.

    At `scale` s, 1/4, 1/16 or 1/64, numbers become:

    - s of the features and s of the trees, so the same part of features stands in trees, of the same shape.
    - Frequencies keep their range and their law. The number of active features then goes as the square root of s, and
      so does `d_model`: the noise that active features make for each other goes as their number over `d_model`.
    - Steps that push features apart are 1 / sqrt(`d_model`) of the original's, as entries of unit rows are.
    - Sizes, spreads, the rank and scale of correlations, and the bias stay: they are of single features or pairs.

    Args:
        key: Draws the world.
        scale: Part of the features: 1, 1/4, 1/16 or 1/64.
        d_model: Dimensions, in place of those that the scale gives: fewer is more superposition.
        correlation: Scale of the factors that draws have in common; 0 for draws each by itself.
        hierarchy: Whether there are trees.

    Raises:
        ArgumentError: Another scale, or numbers outside their range.
    """
    if scale not in SCALES:
        raise ArgumentError(
            f"scale={scale}: give 1, 1/4, 1/16 or 1/64, at which numbers of features, trees and dimensions are whole."
        )
    d = round(D_MODEL * sqrt(scale)) if d_model is None else d_model
    if d < 1 or not correlation >= 0:
        raise ArgumentError(f"d_model={d}, correlation={correlation}: give 1 or more, and 0 or more.")
    known = round(N_FEATURES * scale)
    rows, towards, spread, factor = jax.random.split(key, 4)
    forest = Forest(round(ROOTS * scale), 4, 3) if hierarchy else None
    chance = zipf(known)
    return World(
        features=pushed_apart(
            jax.random.normal(rows, (known, d)), jnp.float32(RATE * sqrt(D_MODEL / d)), steps=STEPS
        ),
        bias=0.5 * unit(jax.random.normal(towards, (1, d)))[0],
        chance=jnp.asarray(chance if forest is None else forest.compensated(chance), jnp.float32),
        mean=jnp.linspace(5.0, 4.0, known),
        spread=jnp.abs(0.5 + 0.5 * jax.random.normal(spread, (known,))),
        factor=_factor(correlation * jax.random.normal(factor, (known, RANK))),
        forest=forest,
    )


def zipf(
    n: int, *, exponent: float = 0.5, most: float = MOST, least: float = LEAST
) -> Float[np.ndarray, "known"]:
    """Frequencies of `n` features that fall as a power of their rank, stretched to go from `most` to `least`."""
    rank = np.arange(1, n + 1, dtype=np.float64) ** -exponent
    return least + (most - least) * (rank - rank[-1]) / (rank[0] - rank[-1])


def _factor(rows: Float[Array, "known rank"]) -> Float[Array, "known rank"]:
    """Rows that leave each draw a variance of its own."""
    size = jnp.square(rows).sum(-1, keepdims=True)
    return jnp.where(size > 1 - OWN, rows * jnp.sqrt((1 - OWN) / size), rows)
