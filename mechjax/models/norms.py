"""LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

`y = (x - mean) / scale * w + b` with `scale = sqrt(mean((x - mean)**2) + eps)`; RMSNorm has no mean. Computed in
float32 at least, whatever the model's dtype, as Hugging Face does. `scale` and `y` are sites, so freezing a norm is an
edit.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.models.contraction import widened
from mechjax.models.model_config import ModelConfig


class Norm(eqx.Module):
    """One norm, its scale and bias apart; inside `blocks` the parameters have a leading layer axis."""

    w: Float[Array, "*axes width"] | None
    b: Float[Array, "*axes width"] | None

    def __call__(
        self,
        x: Float[Array, "... width"],
        config: ModelConfig,
        mark: Callable[[Array, str], Array] | None = None,
        over: int = 1,
    ) -> Float[Array, "... width"]:
        """Normalise `x` over its last `over` axes; `mark` names "scale" and "normalized"."""
        named = mark or (lambda value, _: value)
        axes = tuple(range(-over, 0))
        centered = widened(x)
        if config.norm == "layer":
            centered = centered - centered.mean(axes, keepdims=True)
        scale = jnp.sqrt(jnp.square(centered).mean(axes, keepdims=True) + config.norm_eps)
        scale = named(jnp.broadcast_to(scale, (*x.shape[:-1], 1)), "scale")
        y = centered / scale
        if self.w is not None:
            w = self.w.astype(y.dtype)
            y = y * (w + config.norm_offset if config.norm_offset else w)
        if self.b is not None:
            y = y + self.b.astype(y.dtype)
        return named(y.astype(x.dtype), "normalized")
