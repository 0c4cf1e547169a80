"""Marks: sites whose axes the catalogue knows, with the paths of the checkpoint's modules that hold the same."""

from collections.abc import Callable, Mapping

from jaxtyping import Array, Int

from mechjax.base.catalogue import SITES
from mechjax.models.model_config import ModelConfig
from mechjax.transform.site import site

Mark = Callable[[Array, str], Array]
"""Names an activation; the identity."""


def marks(config: ModelConfig, start: int = 0) -> Mark:
    """Names activations that have no layer, of the positions from `start` on."""
    also, starts = _also(config), _starts(start)
    return lambda x, name: site(x, name, axes=axes_of(name, config), also=also.get(name, ()), starts=starts)


def marks_of(
    layer: Int[Array, ""] | int,
    config: ModelConfig,
    having: tuple[int, ...] | None = None,
    start: int = 0,
    layers: int | None = None,
) -> Mark:
    """Names the activations of one layer of those that there are, or of those `having` them; `layer` may be traced.

    There are as many as the config says, or `layers`, where a model has several stacks of them.

    Where only the positions from `start` on run, names count from the first all the same.
    """
    also = _also(config)
    layers = config.n_layers if layers is None else layers
    starts = _starts(start)
    return lambda x, name: site(
        x, name, layer=layer, layers=layers, axes=axes_of(name, config), having=having, also=also.get(name, ()),
        starts=starts,
    )  # fmt: skip


def marks_along(
    layer: Int[Array, ""] | int, config: ModelConfig, axis: str, size: int
) -> Callable[[Array, str, Array], Array]:
    """Names what one layer has at one index of `axis`, along which a loop runs: the third argument says where it is."""
    also, layers = _also(config), config.n_layers
    return lambda x, name, at: site(
        x, name, layer=layer, layers=layers, axes=axes_of(name, config), also=also.get(name, ()), along=(axis, at, size)
    )  # fmt: skip


def axes_of(name: str, config: ModelConfig) -> tuple[str, ...]:
    """Names of the axes of a site in a model of this config."""
    entry = SITES[name]
    return entry.in_heads if entry.in_heads and getattr(config, "in_heads", False) else entry.axes


def _also(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    if config.source is None:
        return {}
    # Every family is behind this, and only models that were loaded need them.
    from mechjax.models.families.modules import spellings

    return spellings(config)


def _starts(start: int) -> tuple[tuple[str, int], ...]:
    return (("pos", start), ("query", start)) if start else ()


def unmarked(x: Array, name: str) -> Array:
    """Names nothing."""
    return x


def under(mark: Mark, place: str) -> Mark:
    """Names the activations of a part: "scale" of "ln1" is the site `ln1.scale`."""
    return lambda x, name: mark(x, f"{place}.{name}")
