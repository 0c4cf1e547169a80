"""A mixture of experts in the MLP's place (Shazeer et al. 2017, arXiv:1701.06538).

    y = sum_i weight_i * expert_{index_i}(x) + shared(x)

Each token goes through its chosen experts alone, sorted by expert. Sites inside experts (`expert_pre`,
`expert_pre_linear`, `expert_post`, `expert_out`) name their expert, so when one is asked for, every token goes through
every expert, of which the weights keep the chosen: the same numbers for `n_experts / top_k` times the FLOPs.

Sites: `router_scores` before the softmax, so that -inf there takes an expert away and tokens go elsewhere;
`expert_indices` and `expert_weights`, the choice and its weights, which edits may change. What the shared experts hold
is `shared_pre` to `shared_out`; a layer of experts has no `mlp_pre` and no `mlp_post`, and what it writes is `mlp_out`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.models.config import Config
from mechjax.models.contraction import contract, widened
from mechjax.models.dispatch import dispatch
from mechjax.models.experts import Experts
from mechjax.models.marks import Mark
from mechjax.models.mlp import ACTIVATIONS, MLP
from mechjax.models.quantized import Weight
from mechjax.models.routing import route
from mechjax.transform.context import wanted

INSIDE = ("expert_pre", "expert_pre_linear", "expert_post", "expert_out")
"""Sites that are formed on request, for all experts."""


class MoE(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    W_router: Float[Array, "*layer d_model expert"]
    b_router: Float[Array, "*layer expert"] | None
    b_choice: Float[Array, "*layer expert"] | None
    W_in: Float[Weight, "*layer expert d_model d_mlp"]
    W_gate: Float[Weight, "*layer expert d_model d_mlp"]
    W_out: Float[Weight, "*layer expert d_mlp d_model"]
    b_in: Float[Array, "*layer expert d_mlp"] | None
    b_gate: Float[Array, "*layer expert d_mlp"] | None
    b_out: Float[Array, "*layer expert d_model"] | None
    shared: MLP | None
    W_shared_gate: Float[Array, "*layer d_model"] | None

    def __call__(
        self, x: Float[Array, "*batch pos d_model"], config: Config, mark: Mark
    ) -> Float[Array, "*batch pos d_model"]:
        """What the chosen experts and the shared ones make of `x`.

        Raises:
            ArgumentError: A config without experts.
        """
        if (experts := config.experts) is None:
            raise ArgumentError(
                "A mixture of experts was called, but the config's `experts` is None: pass Experts."
            )
        logits = contract("...m,me->...e", x, self.W_router, config, widened(x).dtype)
        if self.b_router is not None:
            logits = logits + self.b_router.astype(logits.dtype)
        weights, indices = route(mark(logits, "router_scores"), self.b_choice, experts)
        indices = mark(indices, "expert_indices")
        known = (indices >= 0) & (indices < experts.n_experts)
        weights = jnp.where(known, mark(weights, "expert_weights"), jnp.nan)  # an edit's index of no expert
        weights, indices = weights.astype(x.dtype), indices.clip(0, experts.n_experts - 1)
        if any(map(wanted, INSIDE)):
            out = self._through_all(x, weights, indices, config, experts, mark)
        else:
            out = self._through_chosen(x, weights, indices, config, experts)
        return out if self.shared is None else out + self._through_shared(x, self.shared, config, mark)

    def _through_chosen(
        self,
        x: Float[Array, "*batch pos d_model"],
        weights: Float[Array, "*batch pos choice"],
        indices: Int[Array, "*batch pos choice"],
        config: Config,
        experts: Experts,
    ) -> Float[Array, "*batch pos d_model"]:
        plan = dispatch(indices.reshape(-1, experts.top_k), experts.n_experts)
        rows = plan.send(x.reshape(-1, x.shape[-1]))
        gate = plan.multiply(rows, self.W_gate, self.b_gate, config)
        post = _gated(gate, plan.multiply(rows, self.W_in, self.b_in, config), config, experts)
        out = plan.collect(plan.multiply(post, self.W_out, self.b_out, config))
        return contract("tko,tk->to", out, weights.reshape(-1, experts.top_k), config).reshape(x.shape)

    def _through_all(
        self,
        x: Float[Array, "*batch pos d_model"],
        weights: Float[Array, "*batch pos choice"],
        indices: Int[Array, "*batch pos choice"],
        config: Config,
        experts: Experts,
        mark: Mark,
    ) -> Float[Array, "*batch pos d_model"]:
        def multiply(spec: str, x: Array, W: Weight, b: Array | None) -> Array:
            y = contract(spec, x, W, config)
            return y if b is None else y + b

        gate = mark(multiply("...m,emf->...ef", x, self.W_gate, self.b_gate), "expert_pre")
        linear = mark(multiply("...m,emf->...ef", x, self.W_in, self.b_in), "expert_pre_linear")
        post = mark(_gated(gate, linear, config, experts), "expert_post")
        out = multiply("...ef,efm->...em", post, self.W_out, self.b_out)
        chosen = indices[..., None] == jnp.arange(experts.n_experts, dtype=indices.dtype)
        each = jnp.where(chosen, weights[..., None], 0).sum(-2)
        return mark(out * each[..., None], "expert_out").sum(-2)

    def _through_shared(self, x: Array, shared: MLP, config: Config, mark: Mark) -> Array:
        out = shared(x, config, lambda y, name: mark(y, name.replace("mlp_", "shared_")))
        if self.W_shared_gate is not None:
            gate = contract("...m,m->...", x, self.W_shared_gate, config)
            out = out * jax.nn.sigmoid(gate)[..., None]
        return mark(out, "shared_out")


def _gated(gate: Array, linear: Array, config: Config, experts: Experts) -> Array:
    """The gate's activation times the linear branch, both cut where the config says so."""
    if (limit := experts.swiglu_limit) is not None:
        gate, linear = jnp.minimum(gate, limit), jnp.clip(linear, -limit, limit)
    if experts.linear_offset:
        linear = linear + experts.linear_offset
    if (alpha := experts.swiglu_alpha) is not None:
        return gate * jax.nn.sigmoid(alpha * gate) * linear
    return ACTIVATIONS[config.activation](gate) * linear
