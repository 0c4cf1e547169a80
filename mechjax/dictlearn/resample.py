"""Latents that died are begun anew, at what the dictionary reconstructs worst.

    W_dec,i = x / |x|    W_enc,i = 0.2 mean|W_enc of the living| x / |x|    b_enc,i = 0

where x is a token of the batch, drawn with a chance in proportion to its squared loss, less `b_dec` where the
dictionary takes it from its input. The optimiser's moments of these latents are forgotten. AuxK does the same work
without a jump.

Reference: Bricken et al. (2023), "Towards monosemanticity", appendix "Neuron resampling".
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Key

from mechjax.dictionaries import Dictionary
from mechjax.dictlearn.plan import Plan
from mechjax.dictlearn.step import State, trained_part, turned

SHARE = 0.2  # of the living latents' mean length in the encoder


@eqx.filter_jit
def resampled(
    state: State, plan: Plan, x: Float[Array, "batch d_model"], y: Float[Array, "batch d_out"],
    key: Key[Array, ""] | Array,
) -> State:  # fmt: skip
    """The state with dead latents begun anew; the same where none is dead."""
    dead = state.silent >= plan.dead_after
    dictionary = turned(state.dictionary)
    loss = jnp.square(y - dictionary(x)).sum(-1)
    drawn = jax.random.categorical(key, 2 * jnp.log(loss), shape=dead.shape)
    towards, read = y[drawn] - dictionary.b_dec, dictionary.readable(x)[0][drawn]
    unit = lambda rows: rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
    lengths = jnp.linalg.norm(dictionary.W_enc, axis=0)
    living = jnp.where(dead, 0, lengths).sum() / jnp.maximum((~dead).sum(), 1).astype(lengths.dtype)
    length = jnp.where(dead.all(), lengths.mean(), living)
    fresh = [
        jnp.where(dead[:, None], SHARE * length * unit(read), dictionary.W_enc.T),
        jnp.where(dead, 0, dictionary.b_enc),
        jnp.where(dead[:, None], unit(towards), dictionary.W_dec),
    ]
    held = eqx.tree_at(lambda d: [d.W_enc, d.b_enc, d.W_dec], state.dictionary, fresh)
    forgot = _forgotten(state.dictionary, state.optimizer, plan.optimizer, dead)
    return State(held, forgot, jnp.where(dead, 0, state.silent), state.control, state.skipped)


def _forgotten(
    dictionary: Dictionary, state: Any, optimizer: optax.GradientTransformation, dead: Bool[Array, " feature"]
) -> Any:
    """The optimiser's state with 0 for what belongs to dead latents."""
    trained, _ = trained_part(dictionary)
    own = eqx.tree_at(lambda d: [d.W_enc, d.b_enc, d.W_dec], trained, [dead[:, None], dead, dead[:, None]])
    masks = jax.tree.map(lambda x: x if x.dtype == bool else jnp.zeros((), bool), own)
    return optax.tree.map_params(optimizer, lambda x, mask: jnp.where(mask, 0, x), state, masks)
