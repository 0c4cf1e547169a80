"""The mixer of Mamba (Gu and Dao 2023, arXiv:2312.00752), with Falcon Mamba's norms (arXiv:2410.05355) where asked for.

Each channel is convolved over a few tokens, then kept in `d_state` numbers that decay at a rate which the token itself
sets. What is read from them is gated by a second projection of the same token.
"""

from collections.abc import Callable
from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.models.contraction import affine, contract, widened
from mechjax.models.mamba_config import MambaConfig
from mechjax.models.marks import Mark
from mechjax.models.mlp import ACTIVATIONS
from mechjax.models.norms import Norm
from mechjax.models.quantized import Weight
from mechjax.models.recurrence import in_chunks, one_by_one
from mechjax.models.short_conv import short_conv
from mechjax.models.state_cache import StateCache
from mechjax.transform.context import wanted


class MambaMixer(eqx.Module):
    """Weights of one layer's mixer, or of all with a leading layer axis."""

    W_gate: Float[Weight, "*layer d_model d_inner"]
    b_gate: Float[Array, "*layer d_inner"] | None
    W_x: Float[Weight, "*layer d_model d_inner"]
    b_x: Float[Array, "*layer d_inner"] | None
    conv_x: Float[Array, "*layer d_inner tap"]
    b_conv_x: Float[Array, "*layer d_inner"] | None
    W_dt_in: Float[Weight, "*layer d_inner dt_rank"]
    W_B: Float[Weight, "*layer d_inner d_state"]
    W_C: Float[Weight, "*layer d_inner d_state"]
    W_dt: Float[Array, "*layer dt_rank d_inner"]
    b_dt: Float[Array, "*layer d_inner"]
    A_log: Float[Array, "*layer d_inner d_state"]
    D: Float[Array, "*layer d_inner"]
    W_O: Float[Weight, "*layer d_inner d_model"]
    b_O: Float[Array, "*layer d_model"] | None

    def __call__(
        self,
        read: Float[Array, "*batch pos d_model"],
        mask: Bool[Array, "*batch pos"] | None,
        cache: StateCache,
        config: MambaConfig,
        mark: Mark,
        mark_state: Callable[[Array, Array], Array],
    ) -> tuple[Float[Array, "*batch pos d_model"], StateCache]:
        """What the mixer writes, and the cache with these tokens; `mark_state(state, t)` names the state at t."""
        gate = mark(affine(read, self.W_gate, self.b_gate, config), "gate")
        x = mark(affine(read, self.W_x, self.b_x, config), "conv_in")
        x, window = short_conv(x, self.conv_x, self.b_conv_x, cache.windows[0], mask)
        x = mark(ACTIVATIONS[config.activation](mark(x, "conv")), "ssm_in")
        delta = self._normed(contract("...i,ir->...r", x, self.W_dt_in, config), "delta_norm", config, mark)
        delta = contract("...r,ri->...i", mark(delta, "delta_latent"), self.W_dt, config)
        delta = mark(widened(delta) + widened(self.b_dt), "delta_in")
        delta = only_real(mark(jax.nn.softplus(delta), "delta"), mask)
        B, C = (
            mark(self._normed(contract("...i,in->...n", x, W, config), f"{name}_norm", config, mark), name)
            for name, W in (("B", self.W_B), ("C", self.W_C))
        )
        A = -jnp.exp(widened(self.A_log))
        if wanted("state"):
            inputs = delta, x, B[..., None, :], C[..., None, :]
            y, state = one_by_one(inputs, A, cache.state, mark_state)
        else:
            y, state = in_chunks(delta, x, B, C, A, cache.state, config)
        y = mark(y, "readout")
        y = mark(y + widened(x) * widened(self.D), "ssm_out")
        y = mark((y * jax.nn.silu(widened(gate))).astype(read.dtype), "gated")
        out = affine(y, self.W_O, self.b_O, config)
        return mark(out, "mixer_out"), StateCache((window,), state)

    def _normed(self, x: Array, place: str, config: MambaConfig, mark: Mark) -> Array:
        if config.mixer_norm_eps is None:
            return x
        scale = lambda value, name: mark(value, f"{place}.scale") if name == "scale" else value
        return Norm(None, None)(x, replace(config, norm_eps=config.mixer_norm_eps), scale)


def only_real(delta: Float[Array, "*batch pos channel"], mask: Array | None) -> Array:
    """Rates of real tokens; zero at padding, where the state then stays as it is."""
    return delta if mask is None else jnp.where(mask[..., None], delta, 0.0)
