"""JumpReLU dictionaries: a latent is what the encoder gives where that is above the latent's own threshold.

    f = z where z > threshold, else 0        z = x W_enc + b_enc

    "step":       ||y - y_hat||^2 + coefficient * sum_i H(z_i - threshold_i)
    "quadratic":  ||y - y_hat||^2 + coefficient * (L0 / target - 1)^2
    "tanh":       ||y - y_hat||^2 + coefficient * sum_i tanh(4 f_i |W_dec,i|)
                                  + small * sum_i ReLU(threshold_i - z_i) |W_dec,i|

The number of active latents has no derivative, so steps have one that is estimated from what lies in a window of width
`bandwidth` around the threshold: with K(u) = 1 for |u| < 1/2,

    d H / d threshold = -K((z - threshold) / bandwidth) / bandwidth
    d f / d threshold = -threshold K((z - threshold) / bandwidth) / bandwidth

whose mean over tokens is the derivative of the mean, with a density estimated by a box. In "tanh" it also flows to z.
The bandwidth is a length in the units of the data: where few latents fall into the window, thresholds do not move.

Reference: Rajamanoharan et al. (2024), arXiv:2407.14435 (Eq. 9 to 12); "tanh": Anthropic (January 2025), "Dictionary
learning optimization techniques"; "quadratic": the target of Gemma Scope 2, on a batch's mean. Differs from the paper:
the threshold itself is trained, not its logarithm (which moves by steps that hang on its size), and kept from 0 up;
and z is not cut off at 0 first, as in the paper's code: all inactive latents would then lie at 0, in every window that
is wider than twice the threshold, and "tanh" could not pull them up.
"""

from functools import partial
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, drawn
from mechjax.dictionaries.largest import largest_of_each
from mechjax.dictionaries.products import Codes, at_least_float32, few, pairs, read

Penalty = Literal["step", "quadratic", "tanh"]
LARGE = 4.0  # slope of "tanh"
SMALL = 3e-6  # weight of what pulls latents up that are below their threshold
PER_CANDIDATE = 40  # latents in all for each that is looked through as possibly active
FEWEST = 64


class JumpReLU(Dictionary):
    """A JumpReLU dictionary.

    Attributes:
        threshold: Shape (feature,).
        bandwidth: Width of the window around it.
        coefficient: Of the penalty, for data of mean square 1.
        target: Active latents that "quadratic" aims at.
        penalty: "step", "quadratic" or "tanh" (static).
    """

    threshold: Float[Array, "*many feature"]
    bandwidth: Float[Array, "*many"]
    coefficient: Float[Array, "*many"]
    target: Float[Array, "*many"]
    penalty: Penalty = eqx.field(static=True)

    untrained: ClassVar[tuple[str, ...]] = ("bandwidth", "coefficient", "target")

    @property
    def unit_norm(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Rows of the decoder have length 1 where the penalty does not weight them."""
        return self.penalty != "tanh"

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        n_features: int,
        key: Key[Array, ""] | Array,
        penalty: Penalty = "step",
        coefficient: float = 1.0,
        target: float = 32.0,
        threshold: float | None = None,
        bandwidth: float | None = None,
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "JumpReLU":
        """A fresh dictionary: random unit directions, read and written alike.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            key: Draws the directions.
            penalty: "step", "quadratic" or "tanh".
            coefficient: Of the penalty, for data of mean square 1.
            target: Active latents that "quadratic" aims at.
            threshold: At the start; None for 0.001 of the data's length, `sqrt(d_model)`, as in the paper.
            bandwidth: Width of the window; None for the same.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters but thresholds, which are float32 at least: they move by little.

        Raises:
            ArgumentError: Sizes, a target, a threshold or a bandwidth that are not positive, or an unknown penalty.
        """
        arrays = drawn(d_model, n_features, key, d_out=d_out, skip=skip, dtype=dtype)
        arrays["centred"] = False
        start, width = (0.001 * d_model**0.5 if of is None else of for of in (threshold, bandwidth))
        if not (start > 0 and width > 0 and target > 0):
            raise ArgumentError(
                f"threshold={start}, bandwidth={width}, target={target}: each must be positive."
            )
        if penalty not in ("step", "quadratic", "tanh"):
            raise ArgumentError(f"penalty={penalty!r}: expected 'step', 'quadratic' or 'tanh'.")
        wide = at_least_float32(dtype)
        return cls(
            **arrays,
            threshold=jnp.full(n_features, start, wide),
            bandwidth=jnp.asarray(width, wide),
            coefficient=jnp.asarray(coefficient, dtype),
            target=jnp.asarray(target, dtype),
            penalty=penalty,
        )

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token that are above their thresholds."""
        z = self.preactivations(x)
        return jnp.where(z > self.threshold.astype(z.dtype), jax.nn.relu(z), 0)

    def select(self, x: Float[Array, "batch d_model"], stage: Stage) -> Selected | None:
        """What is above its threshold or in the window around it; None where the penalty needs all latents."""
        spare = max(FEWEST, self.n_features // PER_CANDIDATE)
        if self.penalty == "tanh" or not few(self.n_features, spare):
            return None
        dense = lax.stop_gradient(self.preactivations(x))
        lowest = lax.stop_gradient(self.threshold - self.bandwidth / 2).astype(dense.dtype)
        fits = (dense > lowest).sum(-1).max() <= spare
        return Selected(above(dense, lowest, spare, fits), dense, fits)

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error and the penalty."""
        if selected is None or selected.codes.indices is None:
            found = Codes(self.preactivations(x))
            z = found.values
        else:
            found, (seen, b) = selected.codes, self.readable(x)
            z = read(seen, self.W_enc, b, found)
        threshold = found.of_latents(self.threshold).astype(z.dtype)
        width = self.bandwidth.astype(z.dtype)
        threshold = jnp.broadcast_to(threshold, z.shape)
        f = jump(z, threshold, width, self.penalty == "tanh")
        _, outcome = self.outcome(x, y, found.holding(f), {})
        if self.penalty == "tanh":
            part = self._tanh(z, f, threshold)
        else:
            l0 = step(z, threshold, width).sum() / len(x)
            part = l0 if self.penalty == "step" else jnp.square(l0 / self.target - 1)
        part = stage.sparsity * self.coefficient * part
        return outcome.squared_error + part, eqx.tree_at(lambda o: o.parts, outcome, {"sparsity": part})

    def _tanh(self, z: Array, f: Array, threshold: Array) -> Float[Array, ""]:
        norms = self.decoder_norms()
        pulled = SMALL * (jax.nn.relu(threshold - z) * norms).sum(-1).mean()
        return jnp.tanh(LARGE * f * norms).sum(-1).mean() + pulled

    def constrained(self) -> "JumpReLU":
        """With unit rows where the penalty has them so, and thresholds that are positive."""
        return eqx.tree_at(lambda d: d.threshold, super().constrained(), jnp.maximum(self.threshold, 0))

    def scaled(self, read: Any, written: Any) -> "JumpReLU":
        """A dictionary of larger inputs and outputs; thresholds and the bandwidth grow as the latents do."""
        larger = super().scaled(read, written)
        return eqx.tree_at(
            lambda d: [d.threshold, d.bandwidth, d.coefficient],
            larger,
            [self.threshold * written, self.bandwidth * written, self.coefficient * jnp.square(written)],
        )


def above(
    dense: Float[Array, "batch feature"], lowest: Float[Array, " feature"], spare: int, fits: Bool[Array, ""]
) -> Codes:
    """What is above `lowest`, as `spare` pairs of each token; none where that many do not hold all."""
    over = dense - lowest
    none = lambda: (jnp.zeros((len(dense), spare), over.dtype), jnp.zeros((len(dense), spare), jnp.int32))
    over, indices = lax.cond(fits, lambda: largest_of_each(over, spare), none)
    return pairs(jnp.take_along_axis(dense, indices, -1), indices, over > 0)


def _inside(z: Array, threshold: Array, bandwidth: Array) -> Array:
    """K over the bandwidth."""
    return (jnp.abs(z - threshold) < bandwidth / 2).astype(z.dtype) / bandwidth


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def jump(z: Array, threshold: Array, bandwidth: Array, flows: bool) -> Array:
    """`z` above the threshold, else 0; `flows`: whether the estimated derivative of the step reaches `z` too."""
    return jnp.where(z > threshold, z, 0)


@jump.defjvp
def _jump(flows: bool, given: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    z, threshold, bandwidth = given
    at_z, at_threshold, _ = tangents
    moved = -threshold * _inside(z, threshold, bandwidth)
    passed = (z > threshold).astype(z.dtype) - (moved if flows else 0)
    return jump(z, threshold, bandwidth, flows), passed * at_z + moved * at_threshold


@jax.custom_jvp
def step(z: Array, threshold: Array, bandwidth: Array) -> Array:
    """1 above the threshold, else 0."""
    return (z > threshold).astype(z.dtype)


@step.defjvp
def _step(given: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    return step(*given), -_inside(*given) * tangents[1]
