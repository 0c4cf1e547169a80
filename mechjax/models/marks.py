"""Marks: sites whose axes the catalogue knows, with the paths of the checkpoint's modules that hold the same."""

from collections.abc import Callable

from jaxtyping import Array, Int

from mechjax.base.catalogue import SITES
from mechjax.models.families.modules import spellings
from mechjax.models.model_config import ModelConfig
from mechjax.transform.site import site

Mark = Callable[[Array, str], Array]
"""Names an activation; the identity."""


def marks(config: ModelConfig, start: int = 0) -> Mark:
    """Names activations that have no layer, of the positions from `start` on."""
    also, starts = spellings(config), _starts(start)
    return lambda x, name: site(x, name, axes=SITES[name].axes, also=also.get(name, ()), starts=starts)


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
    also = spellings(config)
    layers = config.n_layers if layers is None else layers
    starts = _starts(start)
    return lambda x, name: site(
        x, name, layer=layer, layers=layers, axes=SITES[name].axes, having=having, also=also.get(name, ()),
        starts=starts,
    )  # fmt: skip


def _starts(start: int) -> tuple[tuple[str, int], ...]:
    return (("pos", start), ("query", start)) if start else ()


def unmarked(x: Array, name: str) -> Array:
    """Names nothing."""
    return x


def under(mark: Mark, place: str) -> Mark:
    """Names the activations of a part: "scale" of "ln1" is the site `ln1.scale`."""
    return lambda x, name: mark(x, f"{place}.{name}")
