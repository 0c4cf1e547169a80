"""LayerNorm (Ba et al. 2016, arXiv:1607.06450) and RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467).

`y = (x - mean) / scale * w + b` with `scale = sqrt(mean((x - mean)**2) + eps)`; RMSNorm has no mean. Computed in
float32 whatever the model's dtype, as Hugging Face does. `scale` and `y` are sites, so freezing a norm is an edit.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.models.config import Config


class Norm(eqx.Module):
    """One norm, its scale and bias apart; inside `blocks` the parameters have a leading layer axis."""

    w: Float[Array, "*layer d_model"]
    b: Float[Array, "*layer d_model"] | None

    def __call__(
        self,
        x: Float[Array, "... d_model"],
        config: Config,
        mark: Callable[[Array, str], Array] | None = None,
    ) -> Float[Array, "... d_model"]:
        """Normalise `x`; `mark` names "scale" and "normalized"."""
        named = mark or (lambda value, _: value)
        centered = x.astype(jnp.float32)
        if config.norm == "layer":
            centered = centered - centered.mean(-1, keepdims=True)
        scale = named(jnp.sqrt(jnp.square(centered).mean(-1, keepdims=True) + config.norm_eps), "scale")
        y = centered / scale * self.w.astype(jnp.float32)
        if self.b is not None:
            y = y + self.b.astype(jnp.float32)
        return named(y.astype(x.dtype), "normalized")
