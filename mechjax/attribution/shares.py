"""Activations in two shares, and the rules by which each operation of a block passes them on.

`own` is what came from a source, `rest` is everything else; together they are the activation, to rounding. The rules
are those of contextual decomposition for transformers (Hsu et al. 2024, arXiv:2407.00886).
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.norms import Norm
from mechjax.models.quantized import Weight


class Shares(eqx.Module):
    """An activation as a sum of two."""

    own: Float[Array, "..."]
    rest: Float[Array, "..."]

    @property
    def total(self) -> Float[Array, "..."]:
        """The activation."""
        return self.own + self.rest

    def __add__(self, other: "Shares") -> "Shares":
        return Shares(self.own + other.own, self.rest + other.rest)

    def each(self, fn: Callable[[Array], Array]) -> "Shares":
        """Both through a linear map."""
        return Shares(fn(self.own), fn(self.rest))

    def through(self, fn: Callable[[Array], Array]) -> "Shares":
        """Through what is not linear: the rest gives what it gives alone, the source what it adds to that."""
        rest = fn(self.rest)
        return Shares(fn(self.total) - rest, rest)

    def times(self, other: "Shares") -> "Shares":
        """A product of two, by the same rule."""
        rest = self.rest * other.rest
        return Shares(self.total * other.total - rest, rest)

    def plus(self, bias: Array | None, by: "Shares | None" = None) -> "Shares":
        """With a bias, shared as the sizes of the two (or of those of `by`) are; the rest's where both are zero."""
        if bias is None:
            return self
        own, rest = (jnp.abs(x) for x in ((by or self).own, (by or self).rest))
        part = bias * jnp.where(own > 0, own / jnp.where(own > 0, own + rest, 1), 0)
        return Shares(self.own + part, self.rest + (bias - part))

    def settled(self) -> "Shares":
        """Where the two are of opposite signs, all goes to the larger: such shares otherwise grow without bound."""
        opposite, larger = self.own * self.rest < 0, jnp.abs(self.own) >= jnp.abs(self.rest)
        own = jnp.where(opposite, jnp.where(larger, self.total, 0), self.own)
        return Shares(own, jnp.where(opposite, jnp.where(larger, 0, self.total), self.rest))

    def given(self, source: Bool[Array, "..."] | Bool[Array, ""], ablated: Array) -> "Shares":
        """Where it is the source: all but the ablated value is its own."""
        rest = jnp.where(source, ablated, self.rest)
        return Shares(jnp.where(source, self.total - ablated, self.own), rest)


def affine(spec: str, x: Shares, W: Weight, b: Array | None, config: Config) -> Shares:
    """Through weights, then a bias."""
    return x.each(lambda part: contract(spec, part, W, config)).plus(b)


def normalised(x: Shares, norm: Norm | None, config: Config) -> Shares:
    """Through a norm, both at the scale of the whole."""
    if norm is None:
        return x
    centred = x.each(lambda part: part - part.mean(-1, keepdims=True)) if config.norm == "layer" else x
    scale = jnp.sqrt(jnp.square(centred.total).mean(-1, keepdims=True) + config.norm_eps)
    weight = 1.0 if norm.w is None else norm.w + jnp.asarray(config.norm_offset, norm.w.dtype)
    return centred.each(lambda part: part / scale * weight).plus(norm.b, x)
