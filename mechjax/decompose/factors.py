"""Heads and neurons as factors: how strongly each was on, and the weights through which it writes.

Norms after attention and MLP, where there are any, are held at the scale of the run and put into the factors, as is the
factor on what is written: then the units of a layer, with its biases, sum to what the layer wrote.
"""

from collections.abc import Sequence
from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.decompose.frozen import centred, gain
from mechjax.decompose.recorded import place_of, read
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder
from mechjax.models.norms import Norm
from mechjax.models.quantized import full
from mechjax.transform.captured import Activations

Part = Literal["attn", "mlp"]
Layers = Sequence[int]
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
    layers = range(n_layers)
    z = read(acts, {"z": layers}, asked)["z"]
    W_O = model.blocks.attn.W_O[:n_layers]
    return _factors(model, acts, "attn", z, W_O, layers, "z", (_each("H", W_O.shape[1]), 2), asked)


def neuron_sites(model: Decoder, n_layers: int) -> dict[str, tuple[int, ...]]:
    """What the neurons of the first layers are read from: sites, and their layers."""
    config = model.config
    mlps, moes = (
        tuple(i for i in layers if i < n_layers) for layers in (config.mlp_layers, config.expert_layers)
    )
    routed = dict.fromkeys(("expert_post", "expert_indices", "expert_weights"), moes)
    return {"mlp_post": mlps} | routed | {"shared_post": moes if _shared(model) else ()}


def neuron_factors(model: Decoder, acts: Activations, n_layers: int, asked: str) -> list[Factors]:
    """The neurons of the first layers: of MLPs, of experts, times the weights of their experts, of shared experts.

    Raises:
        ArgumentError: Shared experts are gated.
    """
    wanted = neuron_sites(model, n_layers)
    found, (mlp, moe) = read(acts, wanted, asked), full((model.blocks.mlp, model.blocks.moe))
    units: list[Factors] = []

    def add(site: str, on: Array, W_out: Array, names: list[str], own: int) -> None:
        W = W_out[: len(wanted[site])].reshape(len(wanted[site]), -1, 1, W_out.shape[-1])
        part = _factors(model, acts, "mlp", on[..., None], W, wanted[site], site, (names, own), asked)
        units.append(part)

    if mlp is not None and wanted["mlp_post"]:
        add("mlp_post", found["mlp_post"], mlp.W_out, _each("N", mlp.W_out.shape[-2]), 1)
    if moe is not None and wanted["expert_post"]:
        if moe.W_shared_gate is not None:
            raise ArgumentError(
                f"`{asked}` asks for neurons, but what the gate of this model's shared experts lets through is no "
                "site. Take apart into layers, heads or experts: `shared_out` is what they wrote, gate and all."
            )
        n_experts, width = moe.W_out.shape[1:3]
        post = found["expert_post"] * _sent(model, found)[..., None]
        names = [f"E{e}.N{i}" for e in range(n_experts) for i in range(width)]
        add("expert_post", post.reshape(*post.shape[:-2], -1), moe.W_out, names, 2)
        if moe.shared is not None:
            W_out = moe.shared.W_out
            add("shared_post", found["shared_post"], W_out, _each("shared.N", W_out.shape[-2]), 1)
    return units


def expert_vectors(model: Decoder, acts: Activations, n_layers: int, asked: str) -> dict[str, Array]:
    """What each expert of the first layers, and the shared ones, wrote. Each of shape (*place, d_model).

    Raises:
        ArgumentError: A model without experts.
    """
    config = model.config
    if (experts := config.experts) is None:
        raise ArgumentError(
            f"`{asked}` asks for experts; this model has none. Its MLPs are among the 'layers'."
        )
    layers = tuple(i for i in config.expert_layers if i < n_layers)
    wanted = {"expert_out": layers} | ({"shared_out": layers} if experts.d_shared else {})
    found = {
        site: _through(model, acts, "mlp", x, layers, asked) for site, x in read(acts, wanted, asked).items()
    }
    vectors: dict[str, Array] = {}
    for row, layer in enumerate(layers):
        vectors |= {f"L{layer}.E{e}": found["expert_out"][row][..., e, :] for e in range(experts.n_experts)}
        vectors |= {f"L{layer}.shared": found["shared_out"][row]} if experts.d_shared else {}
    return vectors


def biases(
    model: Decoder, acts: Activations, part: Part, n_layers: int, asked: str
) -> Float[Array, "*place d_model"]:
    """What the first layers' biases write in all; one vector for all places, unless they differ from place to place.

    They do where a norm stands after them, and in experts, whose biases count as much as the experts do.
    """
    attn, mlp, moe = model.blocks.attn, model.blocks.mlp, model.blocks.moe
    written: list[tuple[Array | None, tuple[int, ...]]] = []
    if part == "attn":
        written.append((attn.b_O, tuple(range(n_layers))))
    else:
        wanted = neuron_sites(model, n_layers)
        mlps, moes = wanted["mlp_post"], wanted["expert_post"]
        written.append((None if mlp is None else mlp.b_out, mlps))
        each = None
        if moe is not None and moe.b_out is not None and moes:
            sent = _sent(model, read(acts, wanted, asked)).astype(jnp.float32)
            each = jnp.einsum("l...e,lem->l...m", sent, moe.b_out[: len(moes)].astype(jnp.float32))
        written.append((each, moes))
    total = jnp.zeros(model.config.d_model)
    for bias, layers in written:
        if layers:
            shape = (len(layers), model.config.d_model)
            own = jnp.zeros(shape) if bias is None else bias[: len(layers)].astype(jnp.float32)
            total = total + _through(model, acts, part, own, layers, asked, biased=True).sum(0)
    return total


def _each(letter: str, n: int) -> list[str]:
    return [f"{letter}{i}" for i in range(n)]


def _shared(model: Decoder) -> bool:
    return model.blocks.moe is not None and model.blocks.moe.shared is not None


def _sent(model: Decoder, found: dict[str, Array]) -> Float[Array, "layer *place expert"]:
    """What each expert's output is multiplied by: its weight where it was chosen, and 0."""
    n_experts = 0 if model.config.experts is None else model.config.experts.n_experts
    chosen = found["expert_indices"][..., None] == jnp.arange(n_experts)
    return jnp.where(chosen, found["expert_weights"][..., None], 0).sum(-2).astype(found["expert_post"].dtype)


def _norm(model: Decoder, part: Part, layers: Layers) -> tuple[Norm | None, Array]:
    """The norm after attention or MLP, and what it multiplies by in these layers. Shape (layer, d_model or 1)."""
    norm: Norm | None = getattr(model.blocks, _NORM[part])
    if norm is None or norm.w is None:
        return norm, jnp.ones((len(layers), 1))
    return norm, gain(norm, model.config)[jnp.array(layers)]


def _through(
    model: Decoder,
    acts: Activations,
    part: Part,
    x: Array,
    layers: Layers,
    asked: str,
    *,
    biased: bool = False,
) -> Float[Array, "layer *axes d_model"]:
    """What becomes of vectors on their way into the stream: the norm after them and the factor on what is written."""
    config, (norm, times) = model.config, _norm(model, part, layers)
    if norm is not None:
        scale = _post_scale(acts, part, layers, asked)
        if x.ndim == 2:  # the same at every place
            x = jnp.expand_dims(x, tuple(range(1, scale.ndim - 1)))
        scale = jnp.expand_dims(scale, tuple(range(scale.ndim - 1, x.ndim - 1)))
        x = centred(x, config) * jnp.expand_dims(times, tuple(range(1, x.ndim - 1))) / scale
        if biased and norm.b is not None:
            extra = norm.b[jnp.array(layers)].astype(jnp.float32)
            x = x + jnp.expand_dims(extra, tuple(range(1, x.ndim - 1)))
    return x if config.residual_scale == 1.0 else config.residual_scale * x


def _factors(
    model: Decoder,
    acts: Activations,
    part: Part,
    on: Array,
    weights: Array,
    layers: Layers,
    site: str,
    named: tuple[list[str], int],
    asked: str,
) -> Factors:
    """Factors of units, `named` with how many axes of the site are their own."""
    config, (norm, times), (names, own) = model.config, _norm(model, part, layers), named
    found, right = on.shape[-2:], weights.shape[1:3]
    if found != right:
        raise ShapeError(
            f"`{site}` was captured with the sizes {found[: 1 + (part == 'attn')]}, where the model's weights have "
            f"{right[: 1 + (part == 'attn')]}. Capture it whole, from the model that is passed here."
        )
    if norm is not None:
        on = on.astype(jnp.float32) / _post_scale(acts, part, layers, asked)[..., None]
        weights = centred(weights, config) * times[:, None, None]
    if config.residual_scale != 1.0:
        weights = config.residual_scale * weights
    labels = tuple(f"L{i}.{name}" for i in layers for name in names)
    return Factors(on, weights, labels, place_of(acts, site, own))


def _post_scale(acts: Activations, part: Part, layers: Layers, asked: str) -> Float[Array, "layer *place 1"]:
    name = f"{_NORM[part]}.scale"
    return read(acts, {name: layers}, asked)[name]
