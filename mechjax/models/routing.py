"""Which experts each token goes to, and with what weights.

Softmax over all, then the best: Jiang et al. 2024, arXiv:2401.04088 (where the weights are normalised, that equals a
softmax over the chosen ones). Groups of experts: DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.3. Sigmoids, and a
bias that balances the load: DeepSeek-AI 2024, arXiv:2412.19437, Eqs. 12 to 16.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.models.contraction import widened
from mechjax.models.experts import Experts

_TINY = 1e-20  # keeps 0 / 0 away where every chosen sigmoid is 0; changes no other sum


def route(
    logits: Float[Array, "*batch pos expert"], b_choice: Float[Array, " expert"] | None, experts: Experts
) -> tuple[Float[Array, "*batch pos choice"], Int[Array, "*batch pos choice"]]:
    """Weights and indices of the chosen experts, the best first; in float32 at least.

    Differentiable in the weights; the choice itself has no gradient.

    Args:
        logits: The router's output.
        b_choice: Added to the scores for the choice alone.
        experts: How scores choose and weigh.
    """
    logits = widened(logits)
    if experts.scoring == "softmax":
        scores = jax.nn.softmax(logits, -1)
    else:
        scores = jax.nn.sigmoid(logits) if experts.scoring == "sigmoid" else logits
    ranked = scores if b_choice is None else scores + b_choice.astype(scores.dtype)
    if experts.top_groups < experts.n_groups:
        ranked = jnp.where(_in_best_groups(ranked, experts), ranked, -jnp.inf)
    indices = lax.top_k(lax.stop_gradient(ranked), experts.top_k)[1]
    weights = jnp.take_along_axis(scores, indices, -1)
    if experts.scoring == "softmax_chosen":
        weights = jax.nn.softmax(weights, -1)
    if experts.normalized:
        weights = weights / (weights.sum(-1, keepdims=True) + _TINY)
    return weights * experts.scale, indices


def _in_best_groups(ranked: Array, experts: Experts) -> Array:
    """Whether each expert is in one of its token's best groups."""
    grouped = ranked.reshape(*ranked.shape[:-1], experts.n_groups, -1)
    worth = grouped.max(-1) if experts.group_score == "max" else lax.top_k(grouped, 2)[0].sum(-1)
    best = lax.top_k(worth, experts.top_groups)[1]
    chosen = (best[..., None] == jnp.arange(experts.n_groups)).any(-2)
    return jnp.repeat(chosen, grouped.shape[-1], -1)
