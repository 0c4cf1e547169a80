"""Cross-layer transcoders: latents of each layer, which write to what the MLPs of all layers from there on give.

    f_i = z_i where z_i > threshold_i, else 0        z_i = x_i W_enc,i + b_enc,i

    y_hat_l = sum over i <= l of f_i W_dec,i->l + b_dec,l (+ x_l W_skip,l)

    loss = sum_l ||y_l - y_hat_l||^2 + coefficient * sum_i,n tanh(4 f_i,n |W_dec,i,n|)

with |W_dec,i,n| the length of the latent's rows to all layers together, and means over tokens. Steps have the estimated
derivative of `JumpReLU`, which flows to thresholds and encoders.

Cost: for a token 2 L d F operations to read and d F L (L + 1) to write, forwards, and twice as many backwards. Where
few latents of each layer are above their thresholds or in the window around these, k each
(`mechjax.dictionaries.products`), training writes by them alone: d k L (L + 1), and twice as many backwards. Decoders
are held without those to layers before: half of what a square would take. `l0` counts the latents of all layers.
Misleads when: a layer's output is made by latents of layers before because these are cheaper for the
penalty, not because the model does so; compare the replaced model's logits.

Reference: Ameisen et al. (2025), "Circuit tracing: revealing computational graphs in language models", section 2.1.
Differs: `b_enc` begins so that encoders are 0 at the mean of what they read, as for other transcoders here,
not by a rate of activity. `crosslayer-coding` sums the penalty over tokens, so that its coefficient hangs on the batch.
"""

from itertools import pairwise
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, squared
from mechjax.dictionaries.jump_relu import FEWEST, LARGE, PER_CANDIDATE, above, jump
from mechjax.dictionaries.products import Codes, at_least_float32, few, product, read, write

LENGTH = 0.1  # of fresh latents' rows of the decoder, to all layers together
each_layer = jax.vmap(product, in_axes=(-2, 0), out_axes=-2)
to_each_layer = jax.vmap(product, in_axes=(None, 0), out_axes=-2)


class CrossLayerTranscoder(Dictionary):
    """A cross-layer transcoder.

    Attributes:
        W_enc: Shape (layer, d_model, feature).
        b_enc: Shape (layer, feature).
        W_dec: Decoders from i to l >= i: 0 to 0, 0 to 1, ..., 1 to 1, ... (`decoder`). Shape (pair, feature, d_out).
        b_dec: Shape (layer, d_out).
        W_skip: What is added of each layer's own input, shape (layer, d_model, d_out); None for nothing.
        threshold: Shape (layer, feature).
        bandwidth: Width of the window around it.
        coefficient: Of the penalty, for data of mean square 1.
    """

    W_enc: Float[Array, "*many layer d_model feature"]
    b_enc: Float[Array, "*many layer feature"]
    W_dec: Float[Array, "*many pair feature d_out"]
    b_dec: Float[Array, "*many layer d_out"]
    W_skip: Float[Array, "*many layer d_model d_out"] | None = eqx.field(default=None, kw_only=True)
    centred: bool = eqx.field(static=True, default=False, kw_only=True)
    threshold: Float[Array, "*many layer feature"] = eqx.field(kw_only=True)
    bandwidth: Float[Array, "*many"] = eqx.field(kw_only=True)
    coefficient: Float[Array, "*many"] = eqx.field(kw_only=True)

    unit_norm: ClassVar[bool] = False
    untrained: ClassVar[tuple[str, ...]] = ("bandwidth", "coefficient")
    resamples: ClassVar[bool] = False

    @classmethod
    def init(
        cls,
        *,
        n_layers: int,
        d_model: int,
        n_features: int,
        key: Key[Array, ""] | Array,
        coefficient: float = 1.0,
        threshold: float = 0.03,
        bandwidth: float = 1.0,
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "CrossLayerTranscoder":
        """A fresh transcoder: random unit directions that are read, short random rows that are written.

        Args:
            n_layers: How many layers are read and made.
            d_model: Length of what is read at each.
            n_features: Number of latents of each layer.
            key: Draws the directions.
            coefficient: Of the penalty, for data of mean square 1.
            threshold: At the start.
            bandwidth: Width of the window around it.
            d_out: Length of what is written to each layer; None for `d_model`.
            skip: Whether `x W_skip` is added.
            dtype: Of all parameters but thresholds, which are float32 at least.

        Raises:
            ArgumentError: Sizes, a threshold or a bandwidth that are not positive.
        """
        width = d_model if d_out is None else d_out
        if min(n_layers, d_model, n_features, width) < 1 or not (threshold > 0 and bandwidth > 0):
            raise ArgumentError(
                f"n_layers={n_layers}, d_model={d_model}, n_features={n_features}, d_out={width}, "
                f"threshold={threshold}, bandwidth={bandwidth}: each must be positive."
            )
        read, written = jax.random.split(key)
        W_enc = jax.random.normal(read, (n_layers, d_model, n_features), dtype)
        n_pairs = n_layers * (n_layers + 1) // 2
        W_dec = jax.random.normal(written, (n_pairs, n_features, width), dtype)
        made = cls(
            W_enc=W_enc / jnp.linalg.norm(W_enc, axis=-2, keepdims=True),
            b_enc=jnp.zeros((n_layers, n_features), dtype),
            W_dec=W_dec,
            b_dec=jnp.zeros((n_layers, width), dtype),
            W_skip=jnp.zeros((n_layers, d_model, width), dtype) if skip else None,
            threshold=jnp.full((n_layers, n_features), threshold, at_least_float32(dtype)),
            bandwidth=jnp.asarray(bandwidth, at_least_float32(dtype)),
            coefficient=jnp.asarray(coefficient, dtype),
        )
        norms = made.decoder_norms()[made.pairs()[0]]
        return eqx.tree_at(lambda d: d.W_dec, made, LENGTH * W_dec / norms[..., None])

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.b_enc.shape[-2]

    @property
    def latents(self) -> tuple[int, ...]:
        """The shape of a token's latents."""
        return (self.n_layers, self.n_features)

    @property
    def reads(self) -> tuple[int, ...]:
        """The shape of what is read of a token."""
        return (self.n_layers, self.d_model)

    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """For each of `W_dec` the layer whose latents it is of, and the layer that it writes to."""
        return np.triu_indices(self.n_layers)

    def decoder(self, layer: int, to: int) -> Float[Array, "*many feature d_out"]:
        """What latents of `layer` write to layer `to`.

        Raises:
            ArgumentError: Layers that are not there, or in the other order.
        """
        if not 0 <= layer <= to < self.n_layers:
            raise ArgumentError(
                f"there is no decoder from layer {layer} to {to}: latents write to their own layer and to later ones, "
                f"of 0 to {self.n_layers - 1}."
            )
        return self.W_dec[..., self._first(layer) + to - layer, :, :]

    def _first(self, layer: int) -> int:
        """Where in `W_dec` the decoders of a layer begin."""
        return layer * self.n_layers - layer * (layer - 1) // 2

    @on_any_mesh
    def preactivations(self, x: Float[Array, "*batch layer d_model"]) -> Float[Array, "*batch layer feature"]:
        """What the encoders give.

        Raises:
            ShapeError: Other layers, or another length.
        """
        if x.shape[-2:] != self.reads:
            raise ShapeError(
                f"the input has shape {x.shape}, and this transcoder reads {self.n_layers} layers of length "
                f"{self.d_model}: stack them along the axis before the last."
            )
        return each_layer(x, self.W_enc) + self.b_enc

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch layer d_model"]) -> Float[Array, "*batch layer feature"]:
        """The latents of each token and layer that are above their thresholds."""
        z = self.preactivations(x)
        return jnp.where(z > self.threshold.astype(z.dtype), jax.nn.relu(z), 0)

    @on_any_mesh
    def decode(self, f: Float[Array, "*batch layer feature"]) -> Float[Array, "*batch layer d_out"]:
        """What latents write to each layer, `W_skip` aside."""
        made = jnp.broadcast_to(self.b_dec, (*f.shape[:-2], *self.b_dec.shape))
        own = lax.split(
            self.W_dec, range(self.n_layers, 0, -1)
        )  # whose gradients are put together by one copy
        for i, W in enumerate(own):
            made = made.at[..., i:, :].add(to_each_layer(f[..., i, :], W))
        return made

    def completed(
        self, made: Float[Array, "*batch layer d_out"], x: Float[Array, "*batch layer d_model"]
    ) -> Array:
        """`made`, with what `W_skip` adds."""
        return made if self.W_skip is None else made + each_layer(x, self.W_skip)

    def decoder_norms(self) -> Float[Array, "*many layer feature"]:
        """Length of each latent's rows to all layers together."""
        squares = jnp.square(self.W_dec).sum(-1)
        starts = [self._first(i) for i in range(self.n_layers + 1)]
        layers = [squares[..., a:b, :].sum(-2) for a, b in pairwise(starts)]
        sums = jnp.stack(layers, -2)
        return jnp.where(sums > 0, jnp.sqrt(jnp.where(sums > 0, sums, 1)), 0)  # no infinite gradient at 0

    def select(self, x: Float[Array, "batch layer d_model"], stage: Stage) -> Selected | None:
        """For each layer what is above its threshold or in the window around it; None where these are not few."""
        spare = max(FEWEST, self.n_features // PER_CANDIDATE)
        if not few(self.n_features, spare):
            return None
        dense = lax.stop_gradient(jnp.swapaxes(self.preactivations(x), 0, 1))
        lowest = lax.stop_gradient(self.threshold - self.bandwidth / 2).astype(dense.dtype)
        fits = (dense > lowest[:, None]).sum(-1).max() <= spare
        codes = lax.map(lambda of: above(of[0], of[1], spare, fits), (dense, lowest))
        return Selected(codes, dense, fits)

    def loss(
        self,
        x: Float[Array, "batch layer d_model"],
        y: Float[Array, "batch layer d_out"],
        stage: Stage,
        selected: Selected | None,
    ) -> tuple[Float[Array, ""], Outcome]:
        """The error of all layers, and the penalty."""
        width = self.bandwidth.astype(x.dtype)
        flat = lambda a: a.reshape(len(a), -1)
        if selected is None or selected.codes.indices is None:
            z = self.preactivations(x)
            f = jump(z, jnp.broadcast_to(self.threshold.astype(z.dtype), z.shape), width, True)
            made, sizes, fired = self.decode(f), f * self.decoder_norms(), (f != 0).sum(0, dtype=jnp.int32)
        else:
            each = (jnp.swapaxes(x, 0, 1), self.W_enc, self.b_enc, self.threshold, selected.codes)
            active = lax.map(lambda of: _active(of[0], of[1], of[2], of[3], of[4], width), each)
            made = self._written(active)
            norms = lax.map(lambda of: of[0].of_latents(of[1]), (active, self.decoder_norms()))
            sizes = active.values * norms
            fired = lax.map(lambda codes: codes.fired(self.n_features), active)
        part = stage.sparsity * self.coefficient * jnp.tanh(LARGE * sizes).sum() / len(x)
        error, away = (flat(a) for a in (y - self.completed(made, x), y - y.mean(0)))
        l0 = fired.sum().astype(x.dtype) / len(x)
        outcome = Outcome(squared(error), squared(away), fired, l0, {"sparsity": part})
        return outcome.squared_error + part, outcome

    def _written(self, active: Codes) -> Float[Array, "batch layer d_out"]:
        """What few latents of each layer write to each."""

        def pair(made: Array, of: tuple[Array, ...]) -> tuple[Array, None]:
            W, layer, to = of
            return made.at[to].add(write(jax.tree.map(lambda a: a[layer], active), W)), None

        none = jnp.broadcast_to(self.b_dec[:, None], (self.n_layers, active.values.shape[1], self.writes[-1]))
        layer, to = (jnp.asarray(at, jnp.int32) for at in self.pairs())
        return jnp.swapaxes(lax.scan(pair, none, (self.W_dec, layer, to))[0], 0, 1)

    def constrained(self) -> "CrossLayerTranscoder":
        """With thresholds that are not negative."""
        return eqx.tree_at(lambda d: d.threshold, self, jnp.maximum(self.threshold, 0))

    def scaled(
        self, read: Float[Array, "*layer"] | float, written: Float[Array, "*layer"] | float
    ) -> "CrossLayerTranscoder":
        """A transcoder of larger inputs and outputs, each layer by its own factor.

        Exact: `d.scaled(r, w)(r * x) == w * d(x)`, with `r` and `w` of shape (layer, 1) there. Latents are the mean of
        `written` times as large.
        """
        dtype = self.W_enc.dtype
        r, w = (jnp.broadcast_to(jnp.asarray(by, dtype), self.n_layers) for by in (read, written))
        mean = w.mean()
        where = lambda d: [
            d.W_enc, d.b_enc, d.W_dec, d.b_dec, d.threshold, d.bandwidth, d.coefficient,
            *([] if d.W_skip is None else [d.W_skip]),
        ]  # fmt: skip
        over = lambda by, axes: by.reshape(-1, *[1] * axes)
        wide = mean.astype(self.threshold.dtype)
        made = [
            self.W_enc * over(mean / r, 2),
            self.b_enc * mean,
            self.W_dec * over(w[self.pairs()[1]] / mean, 2),
        ]
        made += [self.b_dec * over(w, 1), self.threshold * wide, self.bandwidth * wide]
        made += [self.coefficient * jnp.square(mean)]
        made += [] if self.W_skip is None else [self.W_skip * over(w / r, 2)]
        return eqx.tree_at(where, self, made)


def _active(
    x: Float[Array, "batch d_model"],
    W: Float[Array, "d_model feature"],
    b: Float[Array, " feature"],
    threshold: Float[Array, " feature"],
    found: Codes,
    bandwidth: Float[Array, ""],
) -> Codes:
    """The latents of one layer, of those that were looked through."""
    z = read(x, W, b, found)
    at = jnp.broadcast_to(found.of_latents(threshold).astype(z.dtype), z.shape)
    return found.holding(jump(z, at, bandwidth, True))
