"""Train any model with any loss: a pure step, many steps in one compiled call, the caller's model left as it was."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Float, Int, Key, PyTree

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record

Model = TypeVar("Model")
Loss = Callable[[Any, Any, Array], tuple[Array, dict[str, Array]]]


class History(Record):
    """What a training run measured.

    Attributes:
        step: Which step each entry belongs to, from 1. Shape (entry,).
        metrics: Name -> its value at each entry, "loss" among them. Each of shape (entry,).
    """

    step: Int[Array, "entry"]
    metrics: dict[str, Float[Array, "entry"]]


def fit(
    model: Model,
    loss: Loss,
    batches: Iterator[PyTree],
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    key: Key[Array, ""],
    steps_per_call: int = 25,
    checkpoints: Sequence[int] = (),
    save: Callable[[int, Model], None] | None = None,
) -> tuple[Model, History]:
    """Minimise `loss` over `batches`.

    Args:
        model: A pytree; its floating-point arrays are trained, in a copy.
        loss: `loss(model, batch, key)` gives the scalar to minimise and further scalars to record, by name.
        batches: Gives one batch, a pytree of arrays of fixed shapes, per step.
        optimizer: Any optax transformation.
        steps: Number of steps.
        key: Each step's loss gets its own key, folded from this one by the step's number.
        steps_per_call: Most steps in one compiled call.
        checkpoints: After which steps to call `save`; 0 is before the first.
        save: Called with the step's number and the model then.

    Returns:
        The trained model, and the metrics of every step.

    Raises:
        ArgumentError: No steps, checkpoints outside the run, or too few batches.
    """
    if steps < 1 or steps_per_call < 1 or not all(0 <= at <= steps for at in checkpoints):
        raise ArgumentError(
            f"steps={steps}, steps_per_call={steps_per_call}, checkpoints={list(checkpoints)}: both numbers must be 1 "
            "or more, and every checkpoint from 0 to `steps`."
        )
    trained, fixed = eqx.partition(model, eqx.is_inexact_array)
    carry = jax.tree.map(jnp.copy, (trained, optimizer.init(trained)))  # copies, since the carry is donated
    done, recorded, stops = 0, [], set(checkpoints) | {steps}
    while True:
        if save is not None and done in checkpoints:
            save(done, eqx.combine(jax.tree.map(jnp.copy, carry[0]), fixed))  # a copy, since it may be kept
        if done == steps:
            break
        count = min(min(stop for stop in stops if stop > done) - done, steps_per_call)
        chunk = list(islice(batches, count))
        if len(chunk) < count:
            raise ArgumentError(
                f"`batches` ended after {done + len(chunk)} of {steps} steps: give one for each step."
            )
        chunk += chunk[-1:] * (steps_per_call - count)  # never read: one shape, so one program
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chunk)
        carry, metrics = _advance((fixed, loss, optimizer, stacked, key), carry, jnp.asarray([done, count]))
        recorded.append({name: values[:count] for name, values in metrics.items()})
        done += count
    metrics = {name: jnp.concatenate([entry[name] for entry in recorded]) for name in recorded[0]}
    return eqx.combine(carry[0], fixed), History(jnp.arange(1, steps + 1), metrics)


@eqx.filter_jit(donate="all-except-first")
def _advance(
    given: tuple[Any, Loss, optax.GradientTransformation, PyTree, Array], carry: tuple[Any, Any], span: Array
) -> tuple[tuple[Any, Any], dict[str, Array]]:
    """`span[1]` steps from step `span[0]` on; metrics have one entry per batch in `given`."""
    fixed, loss, optimizer, batches, key = given

    def step(i: Array, carry: tuple[Any, Any]) -> tuple[tuple[Any, Any], dict[str, Array]]:
        trained, state = carry
        batch = jax.tree.map(lambda stacked: lax.dynamic_index_in_dim(stacked, i, keepdims=False), batches)
        objective = lambda trained: loss(
            eqx.combine(trained, fixed), batch, jax.random.fold_in(key, span[0] + i)
        )
        (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it, whatever the caller has set
            updates, state = optimizer.update(grads, state, trained)
            trained = optax.apply_updates(trained, updates)
        return (trained, state), {"loss": value} | metrics

    def active(carry, i):
        skip = lambda i, carry: (carry, jax.tree.map(jnp.zeros_like, jax.eval_shape(step, i, carry)[1]))
        return lax.cond(i < span[1], step, skip, i, carry)

    count = jax.tree.leaves(batches)[0].shape[0]
    return lax.scan(active, carry, jnp.arange(count))
