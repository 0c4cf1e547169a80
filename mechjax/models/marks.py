"""Marks: sites whose axes the catalogue knows."""

from collections.abc import Callable

from jaxtyping import Array, Int

from mechjax.base.catalogue import SITES
from mechjax.transform.site import site

Mark = Callable[[Array, str], Array]
"""Names an activation; the identity."""


def mark(x: Array, name: str) -> Array:
    """Name an activation that has no layer."""
    return site(x, name, axes=SITES[name].axes)


def marks_of(layer: Int[Array, ""] | int, layers: int, having: tuple[int, ...] | None = None) -> Mark:
    """Names the activations of one of `layers` layers, or of those `having` them; `layer` may be traced."""
    return lambda x, name: site(x, name, layer=layer, layers=layers, axes=SITES[name].axes, having=having)


def under(mark: Mark, place: str) -> Mark:
    """Names the activations of a part: "scale" of "ln1" is the site `ln1.scale`."""
    return lambda x, name: mark(x, f"{place}.{name}")
