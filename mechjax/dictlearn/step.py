"""One step of training: the loss's gradient, the optimiser's update, and what holds after every step.

Rows of the decoder that have length 1 keep it: what of the gradient points along them is taken out before the
optimiser sees it, or its moments would fill with what the next line undoes (Bricken et al. 2023, appendix).
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.dictionaries import Dictionary, Stage
from mechjax.dictionaries.dictionary import Outcome
from mechjax.dictionaries.products import Codes
from mechjax.dictlearn.plan import Plan

CONTROL = 0.01  # by which the controller moves its share in a step, where L0 is twice the target
FARTHEST = 10.0  # how much more than twice as far moves it no faster


class State(eqx.Module):
    """What a step changes.

    Attributes:
        dictionary: What is trained, its encoder transposed: gradients of few latents are rows then.
        optimizer: The optimiser's state.
        silent: For each latent the tokens since it was last active.
        control: What the controller multiplies sparsity by.
        skipped: Batches that were not finite.
    """

    dictionary: Dictionary
    optimizer: Any
    silent: Int[Array, "*layer feature"]
    control: Float[Array, ""]
    skipped: Int[Array, ""]


def turned(dictionary: Dictionary) -> Dictionary:
    """With the encoder transposed, where there is one; twice is the dictionary itself."""
    if dictionary.W_enc is None:
        return dictionary
    return eqx.tree_at(lambda d: d.W_enc, dictionary, jnp.swapaxes(dictionary.W_enc, -1, -2))


def trained_part(dictionary: Dictionary) -> tuple[Any, Any]:
    """The arrays that gradients change, and the rest."""
    chosen = jax.tree.map(eqx.is_inexact_array, dictionary)
    for name in dictionary.untrained:
        chosen = eqx.tree_at(lambda d, name=name: getattr(d, name), chosen, False)
    return eqx.partition(dictionary, chosen)


def begun(dictionary: Dictionary, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step."""
    held = turned(jax.tree.map(lambda x: jnp.copy(x) if eqx.is_array(x) else x, dictionary))
    with jax.numpy_dtype_promotion("standard"):  # optax needs it, whatever the caller has set
        state = optimizer.init(trained_part(held)[0])
    none = jnp.zeros((), jnp.int32)
    return State(held, state, jnp.zeros(dictionary.latents, jnp.int32), jnp.ones(()), none)


def advanced(
    state: State, plan: Plan, x: Array, y: Array, done: Int[Array, ""]
) -> tuple[State, dict[str, Array]]:
    """One step on one batch, and what was measured; a batch that is not finite changes nothing and is counted."""
    stage = Stage(
        state.silent >= plan.dead_after,
        (state.control * jnp.minimum((done + 1) / jnp.maximum(plan.sparsity_warm_up, 1), 1)).astype(x.dtype),
        (done / plan.steps).astype(x.dtype),
    )
    (value, outcome), grads = _gradients(state.dictionary, x, y, stage)
    grads = _along_spheres(state.dictionary, grads)
    length = optax.tree.norm(grads)
    fine = jnp.isfinite(value) & jnp.isfinite(length) & jnp.isfinite(x).all() & jnp.isfinite(y).all()
    trained, rest = trained_part(state.dictionary)
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = plan.optimizer.update(grads, state.optimizer, trained)
        stepped: Any = optax.apply_updates(trained, optax.tree.scale(plan.rate(done), updates))
    moved = eqx.combine(stepped, rest).constrained().observed(outcome)
    fired = outcome.fired > 0
    silent = jnp.where(fired, 0, state.silent + jnp.int32(len(x)))
    after = State(moved, optimizer, silent, _steered(state.control, outcome, plan), state.skipped)
    before = eqx.tree_at(lambda s: s.skipped, state, state.skipped + 1)
    kept = jax.tree.map(
        lambda new, old: jnp.where(fine, new, old) if eqx.is_array(new) else new, after, before
    )
    measured = {"fine": fine, "loss": value, "fvu": outcome.fvu, "l0": outcome.l0, "grad_norm": length}
    measured |= {"dead": stage.dead.sum().astype(x.dtype), "sparsity_scale": stage.sparsity} | outcome.parts
    return kept, measured


def _gradients(dictionary: Dictionary, x: Array, y: Array, stage: Stage) -> tuple[tuple[Array, Outcome], Any]:
    """The loss and its gradient, through few latents where all that is kept fits among them."""
    trained, rest = trained_part(dictionary)
    whole = lambda trained: turned(eqx.combine(trained, rest))
    selected = whole(trained).select(x, stage)

    def of(given: Any) -> Callable[[], Any]:
        loss = lambda trained: whole(trained).loss(x, y, stage, given)
        return lambda: jax.value_and_grad(loss, has_aux=True)(trained)

    if selected is None or selected.fits is None:
        return of(selected)()
    every = eqx.tree_at(
        lambda s: s.codes, selected, Codes(selected.dense), is_leaf=lambda s: isinstance(s, Codes)
    )
    return lax.cond(selected.fits, of(selected), of(every))


def _along_spheres(dictionary: Dictionary, grads: Any) -> Any:
    """Gradients without what points along rows of the decoder that have length 1."""
    if not dictionary.unit_norm:
        return grads
    W, g = dictionary.W_dec, grads.W_dec
    return eqx.tree_at(lambda d: d.W_dec, grads, g - (g * W).sum(-1, keepdims=True) * W)


def _steered(control: Array, outcome: Outcome, plan: Plan) -> Array:
    """The controller's share: up where more latents are active than the target, by a fixed part for each time."""
    if plan.target_l0 is None:
        return control
    over = jnp.clip(outcome.l0 / plan.target_l0 - 1, -1, FARTHEST).astype(control.dtype)
    return control * jnp.exp(CONTROL * over)
