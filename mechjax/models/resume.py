"""Run a decoder from any residual at any layer, so that a sweep recomputes only what its edit can change.

Scans the layer counter alone and indexes the stacked weights inside the taken branch: weights scanned beside a `cond`
are copied even where they are skipped. Under `vmap` over layers the branch becomes a select and every layer runs: map
over layers with `lax.map` and over everything else with `vmap`. Reverse mode through a resumed run costs about 2.3
times the residual memory of a plain one: gradients use the whole model.
"""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import SiteError
from mechjax.models.decoder import Decoder


class Resumed(eqx.Module):
    """A decoder that starts at `layer`, whose sites are the model's from there on."""

    model: Decoder
    layer: Int[Array, ""]

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch pos d_vocab"]:
        """Logits, given the residual stream that enters `layer` (its `resid_pre`)."""
        return _unembedded(self, resid, mask, positions)

    def blocks(
        self,
        resid: Float[Array, "*batch pos d_model"],
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch pos d_model"]:
        """The final residual stream, not unembedded: `model.unembed` it where the logits are read."""
        return _blocks(self, resid, mask, positions)


def resume(model: Decoder, layer: Int[Array, ""] | int) -> Resumed:
    """The rest of `model` from `layer` on.

    Args:
        model: The decoder.
        layer: First layer that runs, from 0 to n_layers (which only unembeds); may be traced.

    Returns:
        A callable from the residual stream entering `layer` to logits; `resume(model, 0)(model.embed(tokens))` is
        `model(tokens)`.

    Raises:
        SiteError: A layer that the model does not have, where it can be seen.
    """
    n_layers = model.config.n_layers
    if isinstance(layer, int) and not 0 <= layer <= n_layers:
        raise SiteError(
            f"Cannot resume at layer {layer}: the model has {n_layers}, so 0 to {n_layers} are possible."
        )
    return Resumed(model, jnp.asarray(layer, jnp.int32))


@eqx.filter_jit
def _blocks(resumed: Resumed, resid: Array, mask: Array | None, positions: Array | None) -> Array:
    model, start = resumed.model, resumed.layer
    sequence = model.arrange(resid.shape[-2], mask=mask, positions=positions)

    def step(resid: Array, layer: Array) -> tuple[Array, None]:
        return lax.cond(layer >= start, lambda x: model.block(x, layer, sequence), lambda x: x, resid), None

    return lax.scan(step, resid, jnp.arange(model.config.n_layers, dtype=start.dtype))[0]


@eqx.filter_jit
def _unembedded(resumed: Resumed, resid: Array, mask: Array | None, positions: Array | None) -> Array:
    return resumed.model.unembed(_blocks(resumed, resid, mask, positions))
