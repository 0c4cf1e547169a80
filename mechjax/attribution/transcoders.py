"""Transcoders of a model's MLPs side by side: what each latent reads, and what it writes to the residual stream.

    z_i = x . W_enc[:, i] + b_i        f_i = z_i where it is active, else 0        mlp_out = sum_i f_i W_dec[i] + b_dec
                                                                                       (+ x W_skip) + what is missed

where x is what the MLP is given. So a latent is linear in what it reads and in what it writes, and bends only by being
active or not: kinds of which this is not true are refused. Of gated transcoders z is their size, before the gate.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, UnsupportedModelError
from mechjax.dictionaries import BatchTopK, CrossLayerTranscoder, Dictionary, Gated, JumpReLU, ReLU, TopK
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.quantized import Weight
from mechjax.transform.select import is_concrete

Reads = Literal["ln2.normalized", "mlp_in"]
"""What transcoders read: what the MLP is given, or the stream before the norm that stands there."""

LINEAR = (ReLU, TopK, BatchTopK, JumpReLU, Gated, CrossLayerTranscoder)
"""Kinds whose active latents are what their encoder gives; their subclasses too."""


class Transcoders(eqx.Module):
    """Transcoders, stacked, and of which layers they are.

    Attributes:
        stack: The dictionaries, every array with a leading axis of transcoders; or one that is cross-layer.
        layers: The layer of each (static).
        n_layers: Layers of the model (static).
        reads: What they read (static).
    """

    stack: Dictionary
    layers: tuple[int, ...] = eqx.field(static=True)
    n_layers: int = eqx.field(static=True)
    reads: Reads = eqx.field(static=True)

    @property
    def n_features(self) -> int:
        """Latents of each."""
        return self.stack.W_enc.shape[-1]

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """For each decoder the transcoder whose latents it is of, and the layer that it writes to."""
        if isinstance(self.stack, CrossLayerTranscoder):
            return self.stack.pairs()
        return np.arange(len(self.layers)), np.array(self.layers)

    def encode(self, x: Float[Array, "transcoder d_model"]) -> Float[Array, "transcoder feature"]:
        """The latents of one token, from what the MLP of each layer is given."""
        x = x.astype(self.stack.W_enc.dtype)
        if isinstance(self.stack, CrossLayerTranscoder):
            return self.stack.encode(x)
        return jax.vmap(lambda own, x: own.encode(x))(self.stack, x)

    def encoder(
        self, layer: Int[Array, ""], feature: Int[Array, ""], config: Config, dtype: Any
    ) -> tuple[Float[Array, " d_model"], Float[Array, ""]]:
        """What a latent reads, and what is added to it; NaN where there is no such latent."""
        d, row = self.stack, self._row(layer)
        number = lambda x: entry(x, row, feature).astype(dtype)
        vector, bias = entry(d.W_enc, row, slice(None), feature).astype(dtype), number(d.b_enc)
        if isinstance(d, Gated):
            vector, bias = vector * jnp.exp(number(d.r)), number(d.b_size)
        if d.centred:
            bias = bias - contract("m,m->", entry(d.b_dec, row).astype(dtype), vector, config)
        return vector, bias

    def skipped(
        self, layer: Int[Array, ""], direction: Float[Array, " d_model"], config: Config
    ) -> Float[Array, " d_model"]:
        """What is read through `W_skip` of a layer, by what reads its output along a direction; 0 without."""
        if self.stack.W_skip is None:
            return jnp.zeros_like(direction)
        W = entry(self.stack.W_skip, self._row(layer)).astype(direction.dtype)
        return contract("io,o->i", W, direction, config)

    def onto(
        self, direction: Float[Array, " d_model"], n_mlp: Int[Array, ""], config: Config
    ) -> Float[Array, "pair feature"]:
        """What decoders write along a direction for each unit of a latent; 0 of those to layers from `n_mlp` on."""
        found = contract("pfm,m->pf", self.stack.W_dec.astype(direction.dtype), direction, config)
        before = jnp.array(self.pairs[1], jnp.int32) < n_mlp
        return jnp.where(before[:, None], found, 0)

    def of_latent(
        self, x: Float[Array, "transcoder feature"], layer: Int[Array, ""], feature: Int[Array, ""]
    ) -> Float[Array, ""]:
        """The number of one latent among those of all."""
        return entry(x, self._row(layer), feature)

    def biases(self, direction: Float[Array, " d_model"], config: Config) -> Float[Array, " transcoder"]:
        """What `b_dec` of each write along a direction."""
        return contract("tm,m->t", self.stack.b_dec.astype(direction.dtype), direction, config)

    def skips(
        self, direction: Float[Array, " d_model"], x: Float[Array, "transcoder d_model"], config: Config
    ) -> Float[Array, " transcoder"]:
        """What `W_skip` of each writes along a direction, of what each reads; 0 without."""
        if self.stack.W_skip is None:
            return jnp.zeros(len(self.layers), direction.dtype)
        readers = contract("tio,o->ti", self.stack.W_skip.astype(direction.dtype), direction, config)
        return (readers * x).sum(-1)

    def of_each(self, found: Float[Array, "pair *axes"]) -> Float[Array, "transcoder *axes"]:
        """Sums over the layers that a transcoder writes to."""
        return self._summed(found, self.pairs[0], len(self.layers))

    def to_each(self, found: Float[Array, "pair *axes"]) -> Float[Array, "layer *axes"]:
        """Sums over the transcoders that write to a layer."""
        return self._summed(found, self.pairs[1], self.n_layers)

    def at_layers(self, rows: Float[Array, "transcoder *axes"]) -> Float[Array, "layer *axes"]:
        """A number of each transcoder, at its layer; 0 at layers without."""
        return self._summed(rows, np.array(self.layers), self.n_layers)

    def latent(self, layer: Any, feature: Any) -> tuple[Int[Array, ""], Int[Array, ""]]:
        """A latent by its layer and its number, checked as far as they can be seen.

        Raises:
            ArgumentError: No such latent.
            ShapeError: More than one.
        """
        for name, number in (("layer", layer), ("feature", feature)):
            if jnp.shape(number) != () or not jnp.issubdtype(jnp.result_type(number), jnp.integer):
                raise ShapeError(
                    f"{name}={number!r}: one latent is asked for, by two integers; map over them for more, "
                    "jax.vmap(lambda feature: ...)."
                )
        if is_concrete(layer) and int(layer) not in self.layers:
            raise ArgumentError(
                f"layer={int(layer)}: there is no transcoder of that layer; there are those of layers "
                f"{', '.join(map(str, self.layers))}."
            )
        if is_concrete(feature) and not 0 <= int(feature) < self.n_features:
            raise ArgumentError(
                f"feature={int(feature)}: these transcoders have {self.n_features} latents, 0 to {self.n_features - 1}."
            )
        return jnp.asarray(layer, jnp.int32), jnp.asarray(feature, jnp.int32)

    def _row(self, layer: Int[Array, ""]) -> Int[Array, ""]:
        """Which of them is of a layer; one past the last where none is."""
        same = jnp.array(self.layers, jnp.int32) == layer
        return jnp.where(same.any(), same.argmax().astype(jnp.int32), len(self.layers))

    @staticmethod
    def _summed(found: Array, to: np.ndarray, n: int) -> Array:
        return jnp.zeros((n, *found.shape[1:]), found.dtype).at[to].add(found)


Given = Mapping[int, Any] | CrossLayerTranscoder | Transcoders
"""Transcoders as methods take them: `stack_transcoders` says how."""


@needs_decoder("transcoders")
def stack_transcoders(model: Decoder, given: Given, *, reads: Reads = "ln2.normalized") -> Transcoders:
    """Transcoders put side by side, once for many calls: every method that takes transcoders takes these too.

    Args:
        model: The decoder.
        given: Layer -> its transcoder, all of one kind and size, of all layers or of some; or a cross-layer transcoder.
            They make `mlp_out`: what is added to the stream, after a norm and a factor that may stand there.
        reads: What they read: "ln2.normalized", what the MLP is given; or "mlp_in", the stream before its norm. (Many
            are trained where norms' scales are folded into weights: fold the model's too, `fold_norm`.)

    Raises:
        UnsupportedModelError: A model without MLPs.
        NeedsDecoderError: What is no decoder.
        ArgumentError: No transcoder, those of layers that there are not, of several kinds or sizes, or of a kind whose
            latents are not linear in what they read.
        ShapeError: Another width than the model's.
    """
    if model.config.mlp == "none":
        raise UnsupportedModelError("circuits of transcoders need MLPs; this model is attention only.")
    if reads not in get_args(Reads):
        raise ArgumentError(f"reads={reads!r}: transcoders read 'ln2.normalized' or 'mlp_in' here.")
    n_layers, d_model = model.config.n_layers, model.config.d_model
    if isinstance(given, Mapping):
        layers, stack = _stacked(given, n_layers)
        found = Transcoders(stack, layers, n_layers, reads)
    elif isinstance(given, Transcoders):
        found = given
    else:
        _check_kind(given)
        n = given.b_dec.shape[0]
        found = Transcoders(given, tuple(range(n)), n, reads)
    widths = found.stack.W_enc.shape[-2], found.stack.b_dec.shape[-1]
    if (*widths, found.n_layers) != (d_model, d_model, n_layers):
        raise ShapeError(
            f"these transcoders read {widths[0]} numbers and write {widths[1]}, in a model of {found.n_layers} layers; "
            f"this model's stream has {d_model}, and it has {n_layers} layers: they were made for another model."
        )
    return found


def _stacked(given: Mapping[int, Any], n_layers: int) -> tuple[tuple[int, ...], Any]:
    """The layers in order, and their transcoders stacked."""
    layers = tuple(sorted(given))
    if not layers or any(layer not in range(n_layers) for layer in layers):
        raise ArgumentError(
            f"transcoders of layers {list(layers)}: give at least one, at layers 0 to {n_layers - 1}, as "
            "{layer: transcoder}; or a cross-layer transcoder."
        )
    some = [given[layer] for layer in layers]
    for one in some:
        _check_kind(one)
    if any(isinstance(one, CrossLayerTranscoder) for one in some):
        raise ArgumentError(
            "a cross-layer transcoder is of all layers at once: give it as it is, without a layer."
        )
    if len({(jax.tree.structure(d), tuple(x.shape for x in jax.tree.leaves(d))) for d in some}) > 1:
        raise ArgumentError(
            "these transcoders differ in kind or size: they are stacked over layers, so leave those out that differ; "
            "the MLPs of their layers then stay whole."
        )
    return layers, jax.tree.map(lambda *x: jnp.stack(x), *some)


def _check_kind(given: Any) -> None:
    if not isinstance(given, LINEAR):
        raise ArgumentError(
            f"{type(given).__name__} is none of the transcoders that can be taken apart: latents must be what a linear "
            f"encoder gives where they are active, as those of {', '.join(kind.__name__ for kind in LINEAR)} are."
        )


def entry(x: Weight, *index: Any) -> Array:
    """What stands at an index; NaN past the end."""
    return x.at[index].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
