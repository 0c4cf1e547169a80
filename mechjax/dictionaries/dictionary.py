"""What every dictionary is: a linear encoder, what is kept of its latents, and a linear decoder.

    f = kept((x - b_dec) W_enc + b_enc)        x_hat = f W_dec + b_dec

An autoencoder gives back what it reads. A transcoder gives something else (what an MLP writes, from what it reads): it
takes no `b_dec` from its input (`centred=False`) and may add `x W_skip`. The kinds are files beside this one: what
they keep, their loss, and what training does to them after each step.

Sums run over the numbers of a token, means over tokens: a coefficient does not hang on how many tokens a batch has. The
data that coefficients are meant for have mean square 1 (`mechjax.dictlearn.train` sees to that).
"""

from abc import abstractmethod
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.products import Codes, product, write


class Stage(eqx.Module):
    """What a loss needs to know of the run that it is part of.

    Attributes:
        dead: Latents that have not been active for long; None where that is asked for apart (`Dictionary.revives`).
        sparsity: What the coefficient of sparsity is multiplied by: its warm-up, and a controller's share.
        progress: How much of the run is done, 0 to 1.
    """

    dead: Bool[Array, "*layer feature"] | None
    sparsity: Float[Array, ""]
    progress: Float[Array, ""]

    @staticmethod
    def late(n_features: int, dtype: Any = jnp.float32) -> "Stage":
        """The end of a run in which no latent is dead."""
        return Stage(jnp.zeros(n_features, bool), jnp.ones((), dtype), jnp.ones((), dtype))


class Selected(eqx.Module):
    """What a kind keeps of a batch, found without gradients.

    Attributes:
        codes: Pairs with what the encoder gives there, before it is cut off at 0 or at a threshold.
        dense: What the encoder gives at every latent; layers first, where there are several.
        fits: Whether the pairs are all that is kept; None where they always are.
    """

    codes: Codes
    dense: Float[Array, "*layer batch feature"]
    fits: Bool[Array, ""] | None = None


class Outcome(eqx.Module):
    """What a loss measured on its batch.

    Attributes:
        squared_error: Mean over tokens of the squared distance from the target.
        variance: Mean over tokens of the target's squared distance from its mean over the batch.
        fired: For each latent the number of tokens in which it was active.
        l0: Mean number of active latents.
        parts: What was added to the error, by name.
        least: The smallest activation that was kept; None where the kind does not ask.
        held: What the kind keeps of the step for the next one; None for nothing.
        left: What dead latents are to make, where the kind teaches them and was not told which they are.
    """

    squared_error: Float[Array, ""]
    variance: Float[Array, ""]
    fired: Int[Array, "*layer feature"]
    l0: Float[Array, ""]
    parts: dict[str, Float[Array, ""]]
    least: Float[Array, ""] | None = None
    held: Float[Array, " held"] | None = None
    left: Float[Array, "batch d_out"] | None = None

    @property
    def fvu(self) -> Float[Array, ""]:
        """Fraction of the batch's variance that is unexplained; the squared error itself where nothing varies."""
        return self.squared_error / jnp.where(self.variance > 0, self.variance, 1)


class Dictionary(eqx.Module):
    """Base of every kind with one encoder and one decoder.

    Attributes:
        W_enc: Shape (d_model, feature).
        b_enc: Shape (feature,).
        W_dec: Shape (feature, d_out).
        b_dec: Shape (d_out,).
        W_skip: What is added of the input itself, shape (d_model, d_out); None for nothing.
        centred: Whether `b_dec` is taken from the input (static).
    """

    W_enc: Float[Array, "*many d_model feature"]
    b_enc: Float[Array, "*many feature"]
    W_dec: Float[Array, "*many feature d_out"]
    b_dec: Float[Array, "*many d_out"]
    W_skip: Float[Array, "*many d_model d_out"] | None = eqx.field(default=None, kw_only=True)
    centred: bool = eqx.field(static=True, default=True, kw_only=True)

    unit_norm: ClassVar[bool] = True
    """Whether rows of the decoder have length 1, which training then keeps."""
    untrained: ClassVar[tuple[str, ...]] = ()
    """Arrays that no gradient changes: coefficients, and what is estimated."""
    resamples: ClassVar[bool] = True
    """Whether dead latents can be begun anew by directions for an encoder and a decoder of one site."""

    @property
    def trained(self) -> "Dictionary":
        """What training changes: the dictionary itself."""
        return self

    def with_trained(self, trained: "Dictionary") -> "Dictionary":
        """What was trained, as what was given."""
        return trained

    @property
    def revives(self) -> bool:
        """Whether dead latents have a loss of their own, `revival`."""
        return False

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[-1]

    @property
    def d_model(self) -> int:
        """Length of what is read."""
        return self.W_enc.shape[-2]

    @property
    def latents(self) -> tuple[int, ...]:
        """The shape of a token's latents."""
        return (self.n_features,)

    @property
    def reads(self) -> tuple[int, ...]:
        """The shape of what is read of a token."""
        return (self.d_model,)

    @property
    def writes(self) -> tuple[int, ...]:
        """The shape of what is made of a token."""
        return self.b_dec.shape

    @on_any_mesh
    def preactivations(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """What the encoder gives.

        Raises:
            ShapeError: An input of another length.
        """
        x, b = self.readable(x)
        return product(x, self.W_enc) + b

    def readable(
        self, x: Float[Array, "*batch d_model"]
    ) -> tuple[Float[Array, "*batch d_model"], Float[Array, " feature"]]:
        """What is multiplied by `W_enc`, and what is added: the gradient at `b_dec` takes a vector's product.

        Raises:
            ShapeError: An input of another length.
        """
        if x.shape[-1:] != (self.d_model,):
            raise ShapeError(
                f"the input has shape {x.shape}, and this dictionary reads vectors of length {self.d_model}: it was "
                "made for these."
            )
        if not self.centred:
            return x, self.b_enc
        return x - lax.stop_gradient(self.b_dec), _less(self.b_enc, self.b_dec, self.W_enc)

    @abstractmethod
    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token, by itself: how a trained dictionary is used.

        Raises:
            ShapeError: An input of another length.
        """

    @on_any_mesh
    def decode(self, f: Float[Array, "*batch feature"]) -> Float[Array, "*batch d_out"]:
        """What latents stand for, `W_skip` aside."""
        return product(f, self.W_dec) + self.b_dec

    @on_any_mesh
    def __call__(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch d_out"]:
        """What is made of `x`: its latents decoded, and `x W_skip`."""
        return self.completed(self.decode(self.encode(x)), x)

    def completed(self, made: Float[Array, "*batch d_out"], x: Float[Array, "*batch d_model"]) -> Array:
        """`made`, with what `W_skip` adds."""
        return made if self.W_skip is None else made + product(x, self.W_skip)

    def select(self, x: Float[Array, "batch *layer d_model"], stage: Stage) -> Selected | None:
        """What training keeps of a batch; None where the loss finds it by itself."""
        return None

    @abstractmethod
    def loss(
        self,
        x: Float[Array, "batch d_model"],
        y: Float[Array, "batch d_out"],
        stage: Stage,
        selected: Selected | None,
    ) -> tuple[Float[Array, ""], Outcome]:
        """What training minimises, of one batch.

        Args:
            x: What is read.
            y: What is to be made of it; `x` itself for an autoencoder.
            stage: Where the run is.
            selected: What `select` gave; with all latents as its codes where those did not fit.
        """

    def outcome(
        self, x: Array, y: Array, kept: Codes, parts: dict[str, Array], least: Array | None = None
    ) -> tuple[Float[Array, "batch d_out"], Outcome]:
        """The error, and what is measured of it."""
        made = self.completed(write(kept, self.W_dec) + self.b_dec, x)
        return self.measured(y - made, y, kept, parts, least)

    def measured(
        self, error: Array, y: Array, kept: Codes, parts: dict[str, Array], least: Array | None = None
    ) -> tuple[Float[Array, "batch d_out"], Outcome]:
        """The error, and what is measured of it."""
        fired = kept.fired(self.n_features)
        l0 = fired.sum().astype(error.dtype) / len(error)
        return error, Outcome(squared(error), squared(y - y.mean(0)), fired, l0, parts, least)

    def revival(
        self, x: Float[Array, "batch d_model"], error: Float[Array, "batch d_out"],
        dense: Float[Array, "batch feature"], dead: Bool[Array, " feature"],
    ) -> Float[Array, ""]:  # fmt: skip
        """The loss of dead latents, where there is one.

        Args:
            x: What is read.
            error: What the others left over.
            dense: What the encoder gives at every latent.
            dead: Which latents are dead.
        """
        return jnp.zeros((), error.dtype)

    def decoder_norms(self) -> Float[Array, "*many feature"]:
        """Length of each latent's row of the decoder."""
        return jnp.linalg.norm(self.W_dec, axis=-1)

    def constrained(self) -> "Dictionary":
        """As training leaves it after a step: rows of the decoder of length 1, where the kind has them so."""
        if not self.unit_norm:
            return self
        return eqx.tree_at(lambda d: d.W_dec, self, self.W_dec / self.decoder_norms()[..., None])

    def observed(self, outcome: Outcome) -> "Dictionary":
        """With what is estimated beside the gradients brought up to date."""
        return self

    def scaled(self, read: Float[Array, ""] | float, written: Float[Array, ""] | float) -> "Dictionary":
        """A dictionary of inputs `read` times and outputs `written` times as large, whose latents are the latter times.

        Exact: `d.scaled(r, w)(r * x) == w * d(x)`. A centred dictionary has one bias for both, so r is w.
        """
        ratio = jnp.asarray(written, self.W_enc.dtype) / jnp.asarray(read, self.W_enc.dtype)
        times = jnp.asarray(written, self.W_enc.dtype)
        where = lambda d: [d.W_enc, d.b_enc, d.b_dec, *([] if d.W_skip is None else [d.W_skip])]
        made = [self.W_enc * ratio, self.b_enc * times, self.b_dec * times]
        made += [] if self.W_skip is None else [self.W_skip * ratio]
        return eqx.tree_at(where, self, made)


@jax.custom_vjp
def _less(b: Array, taken: Array, W: Array) -> Array:
    """`b - (taken - what it is) W`: it is `b`, and hands `taken` the gradient that inputs less `taken` would."""
    return b


def _less_back(kept: tuple[Array, Array], g: Array) -> tuple[Array, Array, None]:
    taken, W = kept
    return g, -product(g, W.T).astype(taken.dtype), None


_less.defvjp(lambda b, taken, W: (b, (taken, W)), _less_back)


def squared(x: Float[Array, "batch d"]) -> Float[Array, ""]:
    """Mean over tokens of the squared length."""
    return jnp.square(x).sum(-1).mean()


def drawn(
    d_model: int, n_features: int, key: Key[Array, ""] | Array, *, d_out: int | None, skip: bool, dtype: Any
) -> dict[str, Any]:
    """The arrays of a fresh dictionary: random directions, read and written alike, no biases.

    Raises:
        ArgumentError: Sizes that are not positive.
    """
    if d_model < 1 or n_features < 1 or (d_out is not None and d_out < 1):
        raise ArgumentError(
            f"d_model={d_model}, n_features={n_features}, d_out={d_out}: each size must be 1 or more."
        )
    width = d_model if d_out is None else d_out
    rows = jax.random.normal(key, (n_features, max(d_model, width)), dtype)
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    return {
        "W_enc": unit(rows[:, :d_model]).T,
        "b_enc": jnp.zeros(n_features, dtype),
        "W_dec": unit(rows[:, :width]),
        "b_dec": jnp.zeros(width, dtype),
        "W_skip": jnp.zeros((d_model, width), dtype) if skip else None,
        "centred": d_out is None and not skip,
    }
