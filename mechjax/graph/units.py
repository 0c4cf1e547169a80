"""Parts of an MLP as nodes of a graph: neurons, or latents of a dictionary.

A unit has a value c, one number per position, and a direction D of the stream: it writes c D. What an MLP writes is

    mlp_out = sum over units of c_i D_i + what is left

where what is left holds all other units, biases and, of a dictionary, its error: so splicing a dictionary in changes
nothing. Neurons write `W_out[i]` times what their activation function gives; where a norm stands after the MLP, their
share of the norm's output, at the scale of the run, as heads do. Latents write `W_dec[i]` times what `encode` gives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.models.block import Block
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.mlp import MLP
from mechjax.models.needs import needs_decoder
from mechjax.models.norms import Norm

Reads = Literal["mlp_out", "ln2.normalized"]
Units = tuple[tuple[int, ...], ...]


class Spliced(MLP):
    """An MLP beside a dictionary of what it writes: the same numbers, in parts.

    Attributes:
        dictionary: Has `encode` and `W_dec`; of all layers with a leading layer axis.
        reads: What `encode` is given (static).
    """

    dictionary: Any
    reads: Reads = eqx.field(static=True)


@needs_decoder("graph")
def with_dictionary(model: Decoder, dictionary: Any, *, reads: Reads = "mlp_out") -> Decoder:
    """The model with a dictionary beside each MLP, so that a graph can have its latents as nodes.

    The same numbers: what latents do not say of `mlp_out`, the error, stays with the MLP's own node (Marks et al. 2024,
    arXiv:2403.19647, section 2).

    Args:
        model: The decoder.
        dictionary: A pytree with `encode(x)`, from (..., d_model) to (..., feature), and `W_dec` (feature, d_model);
            every array with a leading layer axis: one dictionary per layer, stacked.
        reads: What is encoded: "mlp_out" for a sparse autoencoder of what the MLP adds to the stream, "ln2.normalized",
            what the MLP is given, for a transcoder.

    Raises:
        ArgumentError: Something that is no such dictionary, or that reads something else.
        ShapeError: Arrays of other sizes.
        UnsupportedModelError: A model without MLPs, or whose layers differ in kind.
    """
    _check_mlps(model)
    if reads not in ("mlp_out", "ln2.normalized"):
        raise ArgumentError(f"reads={reads!r}: a dictionary encodes 'mlp_out' or 'ln2.normalized' here.")
    missing = [name for name in ("encode", "W_dec") if not hasattr(dictionary, name)]
    if missing:
        raise ArgumentError(
            f"the dictionary is a {type(dictionary).__name__} without `{missing[0]}`: give a pytree with "
            "`encode(x)` and `W_dec`, its arrays stacked over layers."
        )
    config = model.config
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(dictionary) if eqx.is_array(leaf)}
    W_dec = jnp.shape(dictionary.W_dec)
    if sizes != {(config.n_layers,)} or len(W_dec) != 3 or W_dec[-1] != config.d_model:
        raise ShapeError(
            f"the dictionary's arrays begin with axes {sorted(sizes)} and W_dec has shape {W_dec}; the model needs "
            f"({config.n_layers}, feature, {config.d_model}): stack one dictionary per layer, "
            "jax.tree.map(lambda *x: jnp.stack(x), *dictionaries)."
        )
    one = jax.tree.map(lambda leaf: leaf[0] if eqx.is_array(leaf) else leaf, dictionary)
    given = jax.ShapeDtypeStruct((2, config.d_model), model.W_E.dtype)
    latents = eqx.filter_eval_shape(lambda d, x: d.encode(x), one, given).shape
    if latents != (2, W_dec[1]):
        raise ShapeError(
            f"encode gives shape {latents} for (2, {config.d_model}) and W_dec has {W_dec[1]} features: encode maps "
            "(..., d_model) to (..., feature)."
        )
    mlp = model.blocks.mlp
    own = {field.name: getattr(mlp, field.name) for field in fields(MLP)}
    return eqx.tree_at(lambda m: m.blocks.mlp, model, Spliced(**own, dictionary=dictionary, reads=reads))


def check_units(
    model: Decoder, units: Mapping[int, Sequence[int]] | Units | Literal["all"], unit: str
) -> Units:
    """Which units of each layer are nodes.

    Raises:
        UnsupportedModelError: MLPs that cannot be taken apart.
        ArgumentError: A layer or a unit that there is not, one named twice, or none at all.
    """
    mlp = _check_mlps(model)
    if unit == "f" and not isinstance(mlp, Spliced):
        raise ArgumentError(
            "the graph has latents of a dictionary as nodes, and the model has none: give the model that "
            "mj.graph.with_dictionary made."
        )
    n_layers = model.config.n_layers
    n = mlp.dictionary.W_dec.shape[1] if isinstance(mlp, Spliced) else model.config.d_mlp
    if units == "all":
        return (tuple(range(n)),) * n_layers
    chosen = dict(enumerate(units)) if isinstance(units, tuple) else units
    if not isinstance(chosen, Mapping) or any(layer not in range(n_layers) for layer in chosen):
        raise ArgumentError(
            f"units={units!r:.80}: give 'all', or units by layer, such as {{0: [3, 17]}}; the model has layers 0 to "
            f"{n_layers - 1}."
        )
    found = tuple(tuple(int(i) for i in chosen.get(layer, ())) for layer in range(n_layers))
    for layer, own in enumerate(found):
        if len(set(own)) < len(own) or any(not 0 <= i < n for i in own):
            raise ArgumentError(
                f"units={units!r:.80}: layer {layer} has {n} units, 0 to {n - 1}, and each can be named once."
            )
    if not any(found):
        raise ArgumentError("units= names no unit: leave it out, or name at least one.")
    return found


def _check_mlps(model: Decoder) -> MLP:
    mlp = model.blocks.mlp
    if mlp is None or model.config.mixed or model.config.experts is not None:
        raise UnsupportedModelError(
            "units of MLPs as nodes need an MLP in every layer; this model has "
            + ("none." if model.config.mlp == "none" else "experts.")
        )
    return mlp


def units_of(units: Units, n_units: int) -> Int[Array, "layer unit"]:
    """The units of each layer, -1 where a layer has fewer than others."""
    filled = [[*own, *[-1] * (n_units - len(own))] for own in units]
    return jnp.asarray(np.array(filled, np.int32))


def values(
    block: Block, x: Float[Array, "*batch d_model"], index: Int[Array, " unit"], config: Config
) -> Float[Array, "*batch unit"]:
    """The value of each unit of one layer where the MLP reads `x` of the stream, before any norm after the MLP."""
    mlp, read = _mlp(block), _normalized(block, x, config)
    if isinstance(mlp, Spliced):
        found = _encoded(block, mlp, read, config)[..., index.clip(min=0)]
    else:
        found = _made(_columns(mlp, index), read, config)
    return jnp.where(index >= 0, found, 0)


def values_apart(
    block: Block, x: Float[Array, "*batch unit d_model"], index: Int[Array, " unit"], config: Config
) -> Float[Array, "*batch unit"]:
    """The value of each unit of one layer where each reads a stream of its own."""
    mlp, read = _mlp(block), _normalized(block, x, config)
    if isinstance(mlp, Spliced):
        every = _encoded(block, mlp, read, config)
        at = jnp.broadcast_to(index.clip(min=0)[:, None], (*every.shape[:-1], 1))
        found = jnp.take_along_axis(every, at, -1)[..., 0]
    else:
        columns = _columns(mlp, index)
        axes = eqx.tree_at(lambda m: m.W_out, jax.tree.map(lambda W: W.ndim - 1, columns), 0)
        one = lambda own, x: _made(jax.tree.map(jnp.expand_dims, own, axes), x, config)
        found = jnp.moveaxis(jax.vmap(one, (axes, -2))(columns, read)[..., 0], 0, -1)
    return jnp.where(index >= 0, found, 0)


def directions(block: Block, index: Int[Array, " unit"], config: Config) -> Float[Array, "unit d_model"]:
    """What each unit of one layer writes where its value is 1 (over the scale of a norm after the MLP)."""
    mlp = _mlp(block)
    if isinstance(mlp, Spliced):
        return mlp.dictionary.W_dec[index.clip(min=0)]
    return written(mlp.W_out[index.clip(min=0)], block.ln2_post, config)


def scaled(
    found: Float[Array, "*batch unit"], block: Block, scale: Float[Array, "*batch one"] | None
) -> Float[Array, "*batch unit"]:
    """Values over the scale of the norm after the MLP, which latents, being those of its output, have in them."""
    if scale is None or isinstance(block.mlp, Spliced):
        return found
    return found / scale.astype(found.dtype)


def written(
    out: Float[Array, "*place d_model"], post: Norm | None, config: Config
) -> Float[Array, "*place d_model"]:
    """What is added to the stream of something that is linear in its norm's scale, which is divided out already."""
    if post is not None:
        if config.norm == "layer":
            out = out - out.mean(-1, keepdims=True)
        if post.w is not None:
            out = out * (post.w + jnp.asarray(config.norm_offset, post.w.dtype))
    return out if config.residual_scale == 1.0 else out * jnp.asarray(config.residual_scale, out.dtype)


def _mlp(block: Block) -> MLP:
    if block.mlp is None:
        raise UnsupportedModelError("units of MLPs as nodes need an MLP in every layer.")
    return block.mlp


def _normalized(block: Block, x: Array, config: Config) -> Array:
    norm = block.ln1 if config.residual == "parallel_shared" else block.ln2
    return x if norm is None else norm(x, config)


def _columns(mlp: MLP, index: Array) -> MLP:
    """The MLP of some neurons, of the same class, so that it keeps what backward rules it has."""
    at = index.clip(min=0)
    names = [name for name in ("W_in", "W_gate", "b_in", "b_gate") if getattr(mlp, name) is not None]
    own = lambda m: [getattr(m, name) for name in names]
    mlp = eqx.tree_at(own, mlp, [W[..., at] for W in own(mlp)])
    return eqx.tree_at(
        lambda m: (m.W_out, m.b_out), mlp, (mlp.W_out[at], None), is_leaf=lambda leaf: leaf is None
    )


def _made(mlp: MLP, x: Array, config: Config) -> Array:
    """What the neurons' activation function gives."""
    seen: dict[str, Array] = {}

    def keep(y: Array, name: str) -> Array:
        seen[name] = y
        return y

    mlp(x, config, keep)
    return seen["mlp_post"]


def _encoded(block: Block, mlp: Spliced, read: Array, config: Config) -> Array:
    if mlp.reads == "mlp_out":
        out = mlp(read, config, lambda y, _: y)
        read = out if block.ln2_post is None else block.ln2_post(out, config)
        read = read if config.residual_scale == 1.0 else read * config.residual_scale
    return mlp.dictionary.encode(read)
