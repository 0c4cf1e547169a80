"""What is swept: a site, which of its axes, and positions that have names."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mechjax.base.catalogue import canonical
from mechjax.base.errors import ArgumentError, ShapeError, SiteError, did_you_mean
from mechjax.transform.table import SiteInfo
from mechjax.transform.transforms import list_sites


def swept_site(fn: Any, site: str, ids: Int[Array, "batch pos"]) -> SiteInfo:
    """The site, of all layers, by any of its names.

    Raises:
        SiteError: No such site, or that of one layer.
    """
    name, layer = canonical(site)
    if layer is not None:
        raise SiteError(
            f"`{site}` names one layer; patching sweeps layers: say site='{name}' and read row {layer}."
        )
    return list_sites(fn, jax.ShapeDtypeStruct(ids.shape, ids.dtype))[name]


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
                f"cannot sweep `{axis}`: site `{info.name}` has {', '.join(have)}.{did_you_mean(axis, have)}"
            )
    if len(set(over)) < len(over) or not over:
        raise ArgumentError(f"over={tuple(over)}: name each axis to sweep once, at least one.")
    if positions is not None and "pos" not in over:
        raise ArgumentError(f"positions= names positions to sweep, but over={tuple(over)} has no 'pos'.")
    if positions is not None and not positions:
        raise ArgumentError("positions= is empty: name at least one position.")
    return tuple(a for a in over if a != "layer")


def named_positions(
    positions: Mapping[str, Any] | None, ids: Int[Array, "batch pos"]
) -> Int[Array, "role batch"] | None:
    """The columns of named positions; None where there are none.

    Raises:
        ShapeError: Anything but one position per example.
    """
    for name, at in (positions or {}).items():
        if jnp.shape(at) != ids.shape[:1]:
            raise ShapeError(
                f"position `{name}` has shape {jnp.shape(at)}; one per example is ({ids.shape[0]},)."
            )
    return None if not positions else jnp.stack([jnp.asarray(p, jnp.int32) for p in positions.values()])
