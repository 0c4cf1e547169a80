"""Marks: sites whose axes the catalogue knows."""

from typing import Protocol

from jaxtyping import Array, Int

from mechjax.base.catalogue import SITES
from mechjax.transform.site import site


class Mark(Protocol):
    """Names an activation of one layer (or of none); the identity."""

    def __call__(self, x: Array, name: str, /) -> Array: ...


def mark(x: Array, name: str, /) -> Array:
    """Name an activation that has no layer."""
    return site(x, name, axes=SITES[name].axes)


def marks_of(layer: Int[Array, ""] | int, layers: int) -> Mark:
    """Name the activations of one of `layers` layers; `layer` may be traced."""
    return lambda x, name, /: site(x, name, layer=layer, layers=layers, axes=SITES[name].axes)
