"""Heads and neurons as factors: how strongly each was on, and the weights through which it writes.

Norms after attention and MLP, where there are any, are held at the scale of the run and put into the factors, as is the
factor on what is written: then the units of a layer, with its biases, sum to what the layer wrote.
"""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.decompose.frozen import centred, gain
from mechjax.decompose.recorded import place_of, read
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder
from mechjax.models.mlp import MLP
from mechjax.transform.captured import Activations

Part = Literal["attn", "mlp"]
_NORM = {"attn": "ln1_post", "mlp": "ln2_post"}


class Factors(eqx.Module):
    """What the units of some layers write, `on @ weights`, not yet multiplied.

    Attributes:
        on: Shape (layer, *place, unit, rank).
        weights: Shape (layer, unit, rank, d_model).
        labels: Names of the units, layer by layer.
        place: Names of the axes between.
    """

    on: Float[Array, "layer *place unit rank"]
    weights: Float[Array, "layer unit rank d_model"]
    labels: tuple[str, ...] = eqx.field(static=True)
    place: tuple[str, ...] = eqx.field(static=True)

    def vectors(self, model: Decoder) -> Float[Array, "component *place d_model"]:
        """What each unit writes."""
        written = contract("l...ur,lurm->lu...m", self.on, self.weights, model.config)
        return written.reshape(len(self.labels), *written.shape[2:])

    def onto(
        self, direction: Float[Array, "*onto d_model"], model: Decoder
    ) -> Float[Array, "component *place"]:
        """Its inner product with a direction, without the vectors, in float32."""
        on, weights = (x.astype(jnp.float32) for x in (self.on, self.weights))
        read = contract("lurm,...m->l...ur", weights, direction.astype(jnp.float32), model.config)
        read = jnp.expand_dims(read, tuple(range(1, 1 + on.ndim - read.ndim)))
        return jnp.moveaxis((on * read).sum(-1), -1, 1).reshape(len(self.labels), *on.shape[1:-2])


def head_factors(model: Decoder, acts: Activations, n_layers: int, asked: str) -> Factors:
    """The heads of the first layers: `z` and `W_O`."""
    z = read(acts, {"z": range(n_layers)}, asked)["z"]
    return _factors(model, acts, "attn", z, model.blocks.attn.W_O[:n_layers], "z", asked)


def check_neurons(model: Decoder, asked: str) -> None:
    """Refuse a model whose neurons belong to experts.

    Raises:
        ArgumentError: They do.
    """
    if model.config.experts is not None:
        raise ArgumentError(
            f"`{asked}` asks for neurons, which in this model belong to experts. Take apart into layers or heads: "
            "`mlp_out` is what all experts of a layer wrote."
        )


def neuron_factors(model: Decoder, acts: Activations, n_layers: int, asked: str) -> Factors:
    """The neurons of the first layers: `mlp_post` and `W_out`."""
    post = read(acts, {"mlp_post": range(n_layers)}, asked)["mlp_post"]
    mlp: Any = model.blocks.mlp  # there, since there are neurons
    weights = mlp.W_out[:n_layers, :, None]
    return _factors(model, acts, "mlp", post[..., None], weights, "mlp_post", asked)


def biases(
    model: Decoder, acts: Activations, part: Part, n_layers: int, asked: str
) -> Float[Array, "*place d_model"]:
    """What the first layers' biases write in all; one vector for all places, unless a norm stands after them."""
    attn, mlp, config = model.blocks.attn, model.blocks.mlp, model.config
    bias = attn.b_O if part == "attn" else mlp.b_out if isinstance(mlp, MLP) else None
    norm = getattr(model.blocks, _NORM[part])
    written = jnp.zeros((n_layers, config.d_model)) if bias is None else bias[:n_layers].astype(jnp.float32)
    if norm is not None and n_layers:
        on = 1 / _post_scale(acts, part, n_layers, asked)
        written = jnp.einsum("l...o,lm->l...m", on, centred(written, config) * gain(norm, config)[:n_layers])
        if norm.b is not None:
            extra = norm.b[:n_layers].astype(jnp.float32)
            written = written + jnp.expand_dims(extra, tuple(range(1, written.ndim - 1)))
    return config.residual_scale * written.sum(0)


def _factors(
    model: Decoder, acts: Activations, part: Part, on: Array, weights: Array, site: str, asked: str
) -> Factors:
    config, norm, n_layers = model.config, getattr(model.blocks, _NORM[part]), len(on)
    rank = weights.shape[2] if part == "attn" else 1
    found, right = on.shape[-2:], (*weights.shape[1:2], rank)
    if found != right:
        raise ShapeError(
            f"`{site}` was captured with the sizes {found[: 1 + (part == 'attn')]}, where the model's weights have "
            f"{right[: 1 + (part == 'attn')]}. Capture it whole, from the model that is passed here."
        )
    if norm is not None:
        on = on.astype(jnp.float32) / _post_scale(acts, part, n_layers, asked)[..., None]
        weights = centred(weights, config) * gain(norm, config)[:n_layers, None, None]
    if config.residual_scale != 1.0:
        weights = config.residual_scale * weights
    letter = "H" if part == "attn" else "N"
    labels = tuple(f"L{i}.{letter}{j}" for i in range(n_layers) for j in range(on.shape[-2]))
    return Factors(on, weights, labels, place_of(acts, site, 2 if part == "attn" else 1))


def _post_scale(acts: Activations, part: Part, n_layers: int, asked: str) -> Float[Array, "layer *place 1"]:
    name = f"{_NORM[part]}.scale"
    return read(acts, {name: range(n_layers)}, asked)[name]
