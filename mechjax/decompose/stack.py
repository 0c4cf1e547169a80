"""Stacks of components of a residual stream, as vectors (`Stack`) or as numbers (`Projection`)."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, SiteError, did_you_mean
from mechjax.base.records import Record


class Projection(Record):
    """One number per component, such as what each adds to a logit.

    Attributes:
        values: The numbers. Shape (component, *place).
        bias: What belongs to no component: biases of the last norm and of the unembedding, or None. Shape (*place).
        total: The number of the whole stream, or None where the components are not parts of one. Shape (*place).
        labels: Names of the components: "embed", "attn 0", "mlp 0", "L2.H3", "L1.N17", "bias" (static).
        place: Names of the other axes: batch axes and, unless one position was captured, "pos" (static).
    """

    values: Float[Array, "component *place"]
    bias: Float[Array, "*place"] | None
    total: Float[Array, "*place"] | None
    labels: tuple[str, ...] = eqx.field(static=True)
    place: tuple[str, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The components' names."""
        return {"component": self.labels}

    def __getitem__(self, label: str) -> Float[Array, "*place"]:
        """The numbers of one component."""
        return self.values[_index(label, self.labels)]

    @property
    def gap(self) -> Float[Array, "*place"]:
        """What components and bias leave of `total`: rounding, where no component is missing.

        Raises:
            ArgumentError: The components are not parts of one sum.
        """
        total = _is_sum(self.total)
        return total - self.values.sum(0) - (0.0 if self.bias is None else self.bias)

    @property
    def error(self) -> Float[Array, ""]:
        """Greatest size of `gap` over greatest size of `total`."""
        return _relative(self.gap, self.total)

    def with_remainder(self) -> "Projection":
        """With one more component, "remainder": what the others leave."""
        values = jnp.concatenate([self.values, self.gap[None]])
        return Projection(values, self.bias, self.total, (*self.labels, "remainder"), self.place)


class Stack(Record):
    """Components of the residual stream that something reads, one vector each.

    Attributes:
        values: The vectors. Shape (component, *place, d_model).
        total: The recorded stream that they are parts of; None where they are streams. Shape (*place, d_model).
        labels: Names of the components, as in `Projection` (static).
        place: Names of the axes between (static).
        layer: Whose input they make up: a layer's, or, with the number of layers, the unembedding's (static).
        mlp_input: Whether that layer's MLP reads them, and not its attention (static).
    """

    values: Float[Array, "component *place d_model"]
    total: Float[Array, "*place d_model"] | None
    labels: tuple[str, ...] = eqx.field(static=True)
    place: tuple[str, ...] = eqx.field(static=True)
    layer: int = eqx.field(static=True)
    mlp_input: bool = eqx.field(static=True, default=False)

    @property
    def sizes(self) -> Projection:
        """Length of each vector."""
        lengths = jnp.linalg.norm(self.values.astype(jnp.float32), axis=-1)
        return Projection(lengths, None, None, self.labels, self.place)

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per vector: its component, its place, its length."""
        return self.sizes.rows()

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` longest vectors, as (label, length)."""
        return self.sizes.top(n)

    def __getitem__(self, label: str) -> Float[Array, "*place d_model"]:
        """The vectors of one component."""
        return self.values[_index(label, self.labels)]

    @property
    def gap(self) -> Float[Array, "*place d_model"]:
        """What the components leave of `total`: rounding, where none is missing and no edit was made between them.

        Raises:
            ArgumentError: The components are streams, not parts of one sum.
        """
        return _is_sum(self.total) - self.values.sum(0)

    @property
    def error(self) -> Float[Array, ""]:
        """Greatest size of `gap` over greatest size of `total`."""
        return _relative(self.gap, self.total)

    def with_remainder(self) -> "Stack":
        """With one more component, "remainder": what the others leave."""
        values, labels = jnp.concatenate([self.values, self.gap[None]]), (*self.labels, "remainder")
        return Stack(values, self.total, labels, self.place, self.layer, self.mlp_input)

    def project(self, onto: Float[Array, "*onto d_model"]) -> Projection:
        """Inner products with a direction, one for all places or one for each, in float32."""
        dot = lambda x: (x.astype(jnp.float32) * onto.astype(jnp.float32)).sum(-1)
        total = None if self.total is None else dot(self.total)
        return Projection(dot(self.values), None, total, self.labels, self.place)


def _is_sum(total: Array | None) -> Array:
    if total is None:
        raise ArgumentError(
            "These rows are not parts of one sum (they are residual streams, or lengths), so there is nothing that "
            "they could leave. `decompose_resid` gives the parts that are added between streams."
        )
    return total


def _relative(gap: Array, total: Array | None) -> Float[Array, ""]:
    return jnp.abs(gap).max() / jnp.abs(_is_sum(total)).max()


def _index(label: str, labels: tuple[str, ...]) -> int:
    if label not in labels:
        known = ", ".join(labels[:8]) + (", ..." if len(labels) > 8 else "")
        raise SiteError(f"There is no component `{label}`; there are {known}.{did_you_mean(label, labels)}")
    return labels.index(label)
