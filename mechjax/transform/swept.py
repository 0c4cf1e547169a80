"""What is swept: a site, which of its axes, and positions that have names."""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mechjax.base.catalogue import canonical
from mechjax.base.errors import ArgumentError, ShapeError, SiteError, did_you_mean
from mechjax.transform.table import SiteInfo
from mechjax.transform.transforms import list_sites


def swept_site(fn: Any, site: str, *args: Any, **kwargs: Any) -> SiteInfo:
    """The site, of all layers, by any of its names, in a call whose numbers nobody looks at.

    Raises:
        SiteError: No such site, or that of one layer.
    """
    name, layer = canonical(site)
    if layer is not None:
        raise SiteError(
            f"`{site}` names one layer; patching sweeps layers: say site='{name}' and read row {layer}."
        )
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if eqx.is_array(x) else x, (args, kwargs)
    )
    return list_sites(fn, *shapes[0], **shapes[1])[name]


def swept_axes(info: SiteInfo, over: Sequence[str], positions: Any = None) -> tuple[str, ...]:
    """The swept axes without the layer.

    Raises:
        SiteError: An axis that the site does not have.
        ArgumentError: No axis, one named twice, or named positions without positions that are swept.
    """
    have = (("layer",) if info.stacked else ()) + info.axes
    for axis in over:
        if axis not in have:
            raise SiteError(
                f"cannot sweep `{axis}`: site `{info.name}` has {', '.join(have) or 'no axes with names'}."
                f"{did_you_mean(axis, have)}{_how_to_name(info)}"
            )
    if len(set(over)) < len(over) or not over:
        raise ArgumentError(f"over={tuple(over)}: name each axis to sweep once, at least one.")
    if positions is not None and "pos" not in over:
        raise ArgumentError(f"positions= names positions to sweep, but over={tuple(over)} has no 'pos'.")
    if positions is not None and not positions:
        raise ArgumentError("positions= is empty: name at least one position.")
    return tuple(a for a in over if a != "layer")


def _how_to_name(info: SiteInfo) -> str:
    """What to write so that axes have names, where a site has axes without."""
    if info.axes or info.n_batch < 2:
        return ""
    shown = ", ".join(("'pos'", "'d_model'")[-min(2, info.n_batch - 1) :])
    return (
        f" Its value has shape {info.local}, of which nobody named the axes behind the first. Name them where the "
        f"subject is made: sites={{'mine': ('{info.name}', ({shown},))}} (the last axes), then site='mine'; in a "
        "function of your own: mechjax.site(..., axes=)."
    )


def named_positions(
    positions: Mapping[str, Any] | None, n_examples: int, *sites: SiteInfo
) -> Int[Array, "role batch"] | None:
    """The columns of named positions; None where there are none.

    Raises:
        ShapeError: Anything but one position per example.
        SiteError: A site that has other axes than examples before those with names.
    """
    if not positions:
        return None
    for name, at in positions.items():
        if jnp.shape(at) != (n_examples,):
            raise ShapeError(
                f"position `{name}` has shape {jnp.shape(at)}; one per example is ({n_examples},)."
            )
    for info in sites:
        if info.local[: info.n_batch] != (n_examples,):
            raise SiteError(
                f"positions= are one for each of {n_examples} examples, and site `{info.name}` is {info.describe()}: "
                "examples must be its only axis before those with names."
            )
    return jnp.stack([jnp.asarray(p, jnp.int32) for p in positions.values()])
