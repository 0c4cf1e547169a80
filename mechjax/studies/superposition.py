"""Toy models of superposition: more features than dimensions, kept apart where they are seldom there together.

    x_hat = ReLU(x W W^T + b)        loss = mean over samples of sum_i importance_i (x_i - x_hat_i)^2

where each feature is there with a chance of `1 - sparsity`, uniform in 0 to 1. What is known of the optimum: dense
features keep the most important `d_hidden` in directions at right angles and drop the rest; sparse ones share
dimensions as regular polytopes do: five in a plane stand as a pentagon, at 72 degrees, of length near 1.

    dimensionality_i = |W_i|^2 / sum_j (W_i / |W_i| . W_j)^2

is 1 for a feature with a dimension of its own, 1/2 in an antipodal pair, 2/3 in a triangle, 3/4 in a tetrahedron, 2/5
in a pentagon; it sums to about `d_hidden`.

Reference: Elhage et al. (2022), "Toy models of superposition", arXiv:2209.10652. Many instances are trained at once and
the best is kept, since a run may stop at a shape that is not the best.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record


class Superposition(Record):
    """The best of the instances.

    Attributes:
        W: What each feature is written as.
        b: Bias of each feature's output.
        dimensionality: The part of a dimension that each feature has.
        loss: Of a large fresh sample.
    """

    W: Float[Array, "known hidden"]
    b: Float[Array, "known"]
    dimensionality: Float[Array, "known"]
    loss: Float[Array, ""]

    def angles(self) -> Float[np.ndarray, "known known"]:
        """Between each two features, in degrees."""
        W = np.asarray(self.W, np.float64)
        unit = W / np.maximum(np.linalg.norm(W, axis=-1, keepdims=True), 1e-12)
        return np.degrees(np.arccos(np.clip(unit @ unit.T, -1, 1)))


def superposition(
    n_features: int,
    d_hidden: int,
    *,
    sparsity: float,
    key: Key[Array, ""] | Array,
    importance: float = 1.0,
    n_instances: int = 16,
    steps: int = 6000,
    batch: int = 1024,
    learning_rate: float = 1e-2,
) -> Superposition:
    """Train toy models.

    Args:
        n_features: How many features.
        d_hidden: How many dimensions they share.
        sparsity: The chance that a feature is not there, 0 to 1.
        key: Draws instances and samples.
        importance: Of each feature over that of the one before it.
        n_instances: Models that are trained at once.
        steps: Steps of Adam; the learning rate falls to 0 over them, as a cosine.
        batch: Samples of a step.
        learning_rate: Its peak.

    Raises:
        ArgumentError: Numbers outside their range.
    """
    if (
        min(n_features, d_hidden, n_instances, steps, batch) < 1
        or not 0 <= sparsity < 1
        or not importance > 0
    ):
        raise ArgumentError(
            f"n_features={n_features}, d_hidden={d_hidden}, n_instances={n_instances}, steps={steps}, batch={batch}, "
            f"sparsity={sparsity}, importance={importance}: whole numbers must be 1 or more, sparsity from 0 to below "
            "1, and importance positive."
        )
    weights = jnp.asarray(importance, jnp.float32) ** jnp.arange(n_features, dtype=jnp.float32)
    start, run, last = jax.random.split(key, 3)
    W = jax.random.normal(start, (n_instances, n_features, d_hidden)) * d_hidden**-0.5
    given = (W, jnp.zeros((n_instances, n_features)))
    rate = jnp.float32(learning_rate) * (1 + jnp.cos(jnp.linspace(0, jnp.pi, steps))) / 2
    chance = jnp.float32(1 - sparsity)
    W, b = _trained(given, weights, chance, rate, jax.random.split(run, steps), batch)
    losses = jax.vmap(_loss, (0, None, None, None, None))((W, b), weights, chance, last, 64 * batch)
    best = int(jnp.nanargmin(losses))
    W, b = W[best], b[best]
    lengths = jnp.linalg.norm(W, axis=-1)
    shared = jnp.square(W @ W.T).sum(-1)  # times the length squared
    safe = jnp.maximum(shared, jnp.finfo(W.dtype).tiny)
    return Superposition(W, b, jnp.where(lengths > 0, lengths**4 / safe, 0), losses[best])


def _loss(params: tuple[Array, Array], importance: Array, chance: Array, key: Array, batch: int) -> Array:
    """Of one model, on fresh samples."""
    W, b = params
    there, size = jax.random.split(key)
    shape = (batch, W.shape[0])
    x = jnp.where(jax.random.uniform(there, shape) < chance, jax.random.uniform(size, shape), 0)
    out = jax.nn.relu(jnp.dot(jnp.dot(x, W, precision="highest"), W.T, precision="highest") + b)
    return (importance * jnp.square(x - out)).sum(-1).mean()


@partial(jax.jit, static_argnums=5)
def _trained(
    given: tuple[Array, Array], importance: Array, chance: Array, rates: Array, keys: Array, batch: int
) -> tuple[Array, Array]:
    """All instances, on the same samples."""
    adam = optax.scale_by_adam()
    total = lambda params, key: jax.vmap(_loss, (0, None, None, None, None))(
        params, importance, chance, key, batch
    ).sum()

    def step(carry: tuple, xs: tuple[Array, Array]) -> tuple[tuple, None]:
        params, state = carry
        rate, key = xs
        with jax.numpy_dtype_promotion("standard"):
            updates, state = adam.update(jax.grad(total)(params, key), state, params)
        return (jax.tree.map(lambda p, u: p - rate * u, params, updates), state), None

    return lax.scan(step, (given, adam.init(given)), (rates, keys))[0][0]
