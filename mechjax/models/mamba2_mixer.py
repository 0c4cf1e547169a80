"""The mixer of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060).

As Mamba's, but that a head of channels has one rate, that B and C are shared by the heads of a group and convolved as x
is, and that what is gated passes a norm, which is taken over the channels of a group by itself.
"""

import math
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.models.contraction import affine, widened
from mechjax.models.mamba_config import MambaConfig
from mechjax.models.mamba_mixer import only_real
from mechjax.models.marks import Mark
from mechjax.models.mlp import ACTIVATIONS
from mechjax.models.norms import Norm
from mechjax.models.quantized import Weight
from mechjax.models.recurrence import by_products, one_by_one
from mechjax.models.short_conv import short_conv
from mechjax.models.state_cache import StateCache
from mechjax.transform.context import wanted


class Mamba2Mixer(eqx.Module):
    """Weights of one layer's mixer, or of all with a leading layer axis; channels are those of the heads in turn."""

    W_gate: Float[Weight, "*layer d_model d_inner"]
    b_gate: Float[Array, "*layer d_inner"] | None
    W_x: Float[Weight, "*layer d_model d_inner"]
    b_x: Float[Array, "*layer d_inner"] | None
    W_B: Float[Weight, "*layer d_model d_shared"]
    b_B: Float[Array, "*layer d_shared"] | None
    W_C: Float[Weight, "*layer d_model d_shared"]
    b_C: Float[Array, "*layer d_shared"] | None
    W_dt: Float[Array, "*layer d_model head"]
    b_dt_in: Float[Array, "*layer head"] | None
    conv_x: Float[Array, "*layer d_inner tap"]
    b_conv_x: Float[Array, "*layer d_inner"] | None
    conv_B: Float[Array, "*layer d_shared tap"]
    b_conv_B: Float[Array, "*layer d_shared"] | None
    conv_C: Float[Array, "*layer d_shared tap"]
    b_conv_C: Float[Array, "*layer d_shared"] | None
    b_dt: Float[Array, "*layer head"]
    A_log: Float[Array, "*layer head"]
    D: Float[Array, "*layer head"]
    norm: Norm
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
        heads, groups = (config.n_heads, config.d_head), (config.n_groups, config.d_state)
        gate = affine(read, self.W_gate, self.b_gate, config)
        gate = mark(_split(gate, heads), "gate")
        (x, B, C), windows = self._convolved(read, mask, cache, config, mark)
        act = ACTIVATIONS[config.activation]
        x = mark(act(mark(_split(x, heads), "conv")), "ssm_in")
        delta = affine(read, self.W_dt, self.b_dt_in, config)
        delta = mark(widened(delta) + widened(self.b_dt), "delta_in")
        delta = mark(jnp.clip(jax.nn.softplus(delta), *config.dt_limit), "delta")
        B, C = (mark(act(_split(v, groups)), name) for v, name in ((B, "B"), (C, "C")))
        y, state = self._recur(only_real(delta, mask), x, B, C, cache.state, config, mark_state)
        y = mark(y, "readout")
        y = mark(y + widened(x) * widened(self.D)[:, None], "ssm_out")
        y = mark(y * jax.nn.silu(widened(gate)), "gated")
        out = affine(self._normed(y, config, mark).astype(read.dtype), self.W_O, self.b_O, config)
        return mark(out, "mixer_out"), StateCache(windows, state)

    def _convolved(
        self, read: Array, mask: Array | None, cache: StateCache, config: MambaConfig, mark: Mark
    ) -> tuple[list[Array], tuple[Array, ...]]:
        """x, B and C after their convolutions, and the windows that these leave."""
        heads, groups = (config.n_heads, config.d_head), (config.n_groups, config.d_state)
        parts = (
            ("conv_in", heads, self.W_x, self.b_x, self.conv_x, self.b_conv_x),
            ("B_in", groups, self.W_B, self.b_B, self.conv_B, self.b_conv_B),
            ("C_in", groups, self.W_C, self.b_C, self.conv_C, self.b_conv_C),
        )
        out, windows = [], []
        for (name, axes, W, b, w, bias), window in zip(parts, cache.windows, strict=True):
            given = mark(_split(affine(read, W, b, config), axes), name)
            convolved, left = short_conv(
                given.reshape(*read.shape[:-1], math.prod(axes)), w, bias, window, mask
            )
            out.append(convolved)
            windows.append(left)
        return out, tuple(windows)

    def _recur(
        self,
        delta: Array,
        x: Array,
        B: Array,
        C: Array,
        state: Array,
        config: MambaConfig,
        mark_state: Callable[[Array, Array], Array],
    ) -> tuple[Array, Array]:
        A = -jnp.exp(widened(self.A_log))
        if not wanted("state"):
            return by_products(delta, x, B, C, A, state, config)
        repeats = config.n_heads // config.n_groups
        of_heads = lambda v: jnp.repeat(v, repeats, -2)[..., None, :]
        return one_by_one(
            (delta[..., None], x, of_heads(B), of_heads(C)), A[:, None, None], state, mark_state
        )

    def _normed(self, y: Array, config: MambaConfig, mark: Mark) -> Array:
        """The norm of each group's channels, merged."""
        channels = (config.n_groups, config.d_inner // config.n_groups)
        scale = lambda value, name: mark(value, "gated_norm.scale") if name == "scale" else value
        norm = Norm(None if self.norm.w is None else self.norm.w.reshape(channels), None)
        normed = norm(y.reshape(*y.shape[:-2], *channels), config, scale)
        return mark(normed.reshape(y.shape), "gated_norm.normalized").reshape(*y.shape[:-2], config.d_inner)


def _split(x: Array, axes: tuple[int, int]) -> Array:
    return x.reshape(*x.shape[:-1], *axes)
