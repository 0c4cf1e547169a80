"""What a state space model keeps of the tokens so far: as much as after one token, however many there were."""

import equinox as eqx
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from mechjax.base.errors import ShapeError
from mechjax.models.mamba_config import MambaConfig


class StateCache(eqx.Module):
    """The last inputs of the convolutions, and the states.

    `StateCache.empty` makes one, and the model hands on the next.

    Attributes:
        windows: The last inputs of the convolutions, of x, and in Mamba-2 of B and of C. Shape
            (layer, *batch, d_conv - 1, channel) each.
        state: The states, in float32. Shape (layer, *batch, d_inner, d_state), in Mamba-2
            (layer, *batch, head, d_head, d_state).
    """

    windows: tuple[Float[Array, "..."], ...]
    state: Float[Array, "..."]

    @classmethod
    def empty(
        cls, config: MambaConfig, batch: int | tuple[int, ...], dtype: DTypeLike = jnp.float32
    ) -> "StateCache":
        """The cache of no tokens.

        Args:
            config: The model's.
            batch: The number of examples, or the sizes of the tokens' batch axes (`()` for a single prompt).
            dtype: The model's.
        """
        lead = (config.n_layers, *((batch,) if isinstance(batch, int) else batch))
        shared = (config.d_shared,) * 2 if config.in_heads else ()
        channels = (config.n_heads, config.d_head) if config.in_heads else (config.d_inner,)
        return cls(
            tuple(jnp.zeros((*lead, config.d_conv - 1, n), dtype) for n in (config.d_inner, *shared)),
            jnp.zeros((*lead, *channels, config.d_state), jnp.float32),
        )

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse tokens of another batch.

        Raises:
            ShapeError: Such.
        """
        lead = self.windows[0].shape[1:-2]
        if shape[:-1] != lead:
            raise ShapeError(
                f"Tokens of shape {shape} with a cache of {lead or 'one example'}: the batch axes must be equal. Make "
                "it with `StateCache.empty(config, tokens.shape[:-1])`."
            )
