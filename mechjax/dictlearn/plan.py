"""What a run holds to: numbers that are data, so that other numbers need no other program.

Adam divides by the root mean square of some thousand gradients. Those of the first steps are tens of times as long as
later ones, and would hold a run back for as many steps; so each is brought to length 1 first. SAELens,
dictionary_learning and sparsify clip at a length, which comes to the same where nearly every gradient is longer, as
SAELens' are, and to nothing where losses are small numbers. Of 64 dimensions with 128 features TopK finds .999 in 4,000
steps so, .992 by plain Adam (MCC, median of two seeds); of 128 orthogonal ones .985 and .991.
"""

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError

ADAM = optax.scale_by_adam()
UNIT_ADAM = optax.chain(optax.normalize_by_update_norm(), optax.scale_by_adam())
DEAD_AFTER = 10_000_000  # tokens, as in Gao et al. (2024)


class Plan(eqx.Module):
    """What a run holds to.

    Attributes:
        steps: How many steps the run has.
        learning_rate: Its peak; None where the optimiser has its own.
        warm_up: Steps over which it grows to that.
        falling: Steps at the end over which it falls to 0.
        sparsity_warm_up: Steps over which sparsity grows to its coefficient.
        dead_after: Tokens without activity after which a latent is dead.
        target_l0: Active latents that the controller steers to; None for no controller.
        optimizer: Any transformation of optax (static).
    """

    steps: Int[Array, ""]
    learning_rate: Float[Array, ""] | None
    warm_up: Int[Array, ""]
    falling: Int[Array, ""]
    sparsity_warm_up: Int[Array, ""]
    dead_after: Int[Array, ""]
    target_l0: Float[Array, ""] | None
    optimizer: optax.GradientTransformation = eqx.field(static=True)

    def rate(self, done: Int[Array, ""]) -> Array | float:
        """What updates are multiplied by in the step after `done`: up, level, and down to 0."""
        if self.learning_rate is None:
            return 1.0
        up = (done + 1) / jnp.maximum(self.warm_up, 1)
        down = (self.steps - done) / jnp.maximum(self.falling, 1)
        return -self.learning_rate * jnp.minimum(jnp.minimum(up, down), 1)


def planned(
    steps: int, per_call: int, rate: float, warm_up: int, decay: float, sparsity: float, l0: float | None, dead: int,
    optimizer: optax.GradientTransformation | None, unit_gradients: bool,
) -> Plan:  # fmt: skip
    """What a run holds to.

    Raises:
        ArgumentError: A number outside its range.
    """
    if steps < 1 or per_call < 1 or dead < 1:
        raise ArgumentError(
            f"steps={steps}, steps_per_call={per_call}, dead_after={dead}: each must be 1 or more."
        )
    if not rate > 0 or (l0 is not None and not l0 > 0):
        raise ArgumentError(f"learning_rate={rate}, target_l0={l0}: each must be positive.")
    if not (0 <= decay <= 1 and 0 <= sparsity <= 1 and 0 <= warm_up <= steps):
        raise ArgumentError(
            f"warm_up={warm_up} of {steps} steps, decay={decay}, sparsity_warm_up={sparsity}: the first is a number of "
            "steps, the others are parts of the run, 0 to 1."
        )
    return Plan(
        jnp.int32(steps),
        jnp.float32(rate) if optimizer is None else None,
        jnp.int32(warm_up),
        jnp.int32(round(decay * steps)),
        jnp.int32(sparsity * steps),
        jnp.int32(dead),
        None if l0 is None else jnp.float32(l0),
        (UNIT_ADAM if unit_gradients else ADAM) if optimizer is None else optimizer,
    )
