"""The MLP of a block, plain or gated (Shazeer 2020, arXiv:2002.05202)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array, Float

from mechjax.models.contraction import affine
from mechjax.models.marks import Mark
from mechjax.models.quantized import Weight

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "quick_gelu": lambda x: (
        x * jax.nn.sigmoid(1.702 * x)
    ),  # Hendrycks and Gimpel 2016, arXiv:1606.08415, section 2
}


class MLP(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis; `W_gate` and `b_gate` are None where it is plain."""

    W_in: Float[Weight, "*layer d_model d_mlp"]
    W_gate: Float[Weight, "*layer d_model d_mlp"] | None
    W_out: Float[Weight, "*layer d_mlp d_model"]
    b_in: Float[Array, "*layer d_mlp"] | None
    b_gate: Float[Array, "*layer d_mlp"] | None
    b_out: Float[Array, "*layer d_model"] | None

    def __call__(
        self, x: Float[Array, "*batch pos d_model"], config: Any, mark: Mark
    ) -> Float[Array, "*batch pos d_model"]:
        """`W_out act(W_in x)`, or `W_out (act(W_gate x) * W_in x)`, with biases; any config with `activation` does."""
        act = ACTIVATIONS[config.activation]
        linear = affine(x, self.W_in, self.b_in, config)
        if self.W_gate is None:
            post = act(mark(linear, "mlp_pre"))
        else:
            gate = mark(affine(x, self.W_gate, self.b_gate, config), "mlp_pre")
            post = act(gate) * mark(linear, "mlp_pre_linear")
        return affine(mark(post, "mlp_post"), self.W_out, self.b_out, config)
