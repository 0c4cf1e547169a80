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
from jaxtyping import Array, Bool, Float, Int

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
    """The arrays that gradients change (or their shapes), and the rest."""
    inexact = lambda x: isinstance(x, jax.ShapeDtypeStruct) and jnp.issubdtype(x.dtype, jnp.inexact)
    chosen = jax.tree.map(lambda x: eqx.is_inexact_array(x) or inexact(x), dictionary)
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
    state: State, plan: Plan, x: Array, y: Array, done: Int[Array, ""], mapped: str | None = None
) -> tuple[State, dict[str, Array]]:
    """One step on one batch, and what was measured; a batch that is not finite changes nothing and is counted.

    `mapped` names the axis of many dictionaries, where the step is mapped over one.
    """
    dead = state.silent >= plan.dead_after
    stage = Stage(
        dead,
        (state.control * jnp.minimum((done + 1) / jnp.maximum(plan.sparsity_warm_up, 1), 1)).astype(x.dtype),
        (done / plan.steps).astype(x.dtype),
    )
    (value, outcome), grads = _gradients(state.dictionary, x, y, stage, mapped)
    grads = _along_spheres(state.dictionary, grads)
    length = optax.tree.norm(grads)
    fine = jnp.isfinite(value) & jnp.isfinite(length) & jnp.isfinite(x).all() & jnp.isfinite(y).all()
    trained, rest = trained_part(state.dictionary)
    with jax.numpy_dtype_promotion("standard"):
        updates, optimizer = plan.optimizer.update(grads, state.optimizer, trained)
        stepped: Any = optax.apply_updates(trained, optax.tree.scale(plan.rate(done), updates))
    stepped = _where(
        fine, stepped, trained
    )  # twice: XLA on CPUs would put Adam inside the norms' sums, slowly
    moved = eqx.combine(stepped, rest).constrained().observed(outcome)
    fired = outcome.fired > 0
    silent = jnp.where(fired, 0, state.silent + jnp.int32(len(x)))
    after = State(moved, optimizer, silent, _steered(state.control, outcome, plan), state.skipped)
    before = eqx.tree_at(lambda s: s.skipped, state, state.skipped + 1)
    measured = {"fine": fine, "loss": value, "fvu": outcome.fvu, "l0": outcome.l0, "grad_norm": length}
    measured |= {"dead": dead.sum().astype(x.dtype), "sparsity_scale": stage.sparsity} | outcome.parts
    return _where(fine, after, before), measured


def _where(fine: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b) if eqx.is_array(a) else a, new, old)


def _gradients(
    dictionary: Dictionary, x: Array, y: Array, stage: Stage, mapped: str | None
) -> tuple[tuple[Array, Outcome], Any]:
    """The loss and its gradient, through few latents where all that is kept is among them.

    Of many dictionaries all go the way that the worst of them needs: a choice of each would run both ways for all.
    """
    trained, rest = trained_part(dictionary)
    whole = lambda trained: turned(eqx.combine(trained, rest))
    any_of = lambda flag: flag if mapped is None else lax.pmax(flag.astype(jnp.int32), mapped) > 0
    selected = whole(trained).select(x, stage)
    at = Stage(None, stage.sparsity, stage.progress) if dictionary.revives else stage

    def of(given: Any) -> Callable[[], Any]:
        loss = lambda trained: whole(trained).loss(x, y, at, given)
        return lambda: jax.value_and_grad(loss, has_aux=True)(trained)

    if selected is None or selected.fits is None:
        found = of(selected)()
    else:
        through_all = eqx.tree_at(
            lambda s: s.codes, selected, Codes(selected.dense), is_leaf=lambda s: isinstance(s, Codes)
        )
        found = lax.cond(any_of(~selected.fits), of(through_all), of(selected))
    if selected is None or stage.dead is None or not dictionary.revives:
        return found
    (value, outcome), grads = found
    left, every, dead = outcome.left, selected.dense, stage.dead

    def revived(_: Any, held: tuple[Array, Any]) -> tuple[Array, Any]:
        none, dense = lax.optimization_barrier((held[0], every))  # or XLA does it before the loop, always
        part, more = jax.value_and_grad(lambda t: whole(t).revival(x, left, dense, dead) + none)(trained)
        return part, jax.tree.map(jnp.add, held[1], more)

    times = any_of(dead.any()).astype(jnp.int32)  # a loop of none or one leaves gradients where they are
    part, grads = lax.fori_loop(0, times, revived, (jnp.zeros_like(value), grads))
    kept = eqx.tree_at(lambda o: (o.parts, o.left), outcome, (outcome.parts | {"aux": part}, None))
    return (value + part, kept), grads


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
