"""Looking at a request before anything runs: what cannot work is refused here, with what would."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mechjax.base.catalogue import SITES
from mechjax.base.errors import ShapeError, SiteError, did_you_mean
from mechjax.base.whole import whole
from mechjax.transform.changes import RAW
from mechjax.transform.edits import Edit
from mechjax.transform.request import Read
from mechjax.transform.select import aligned, is_concrete
from mechjax.transform.table import SiteInfo, axis_names

Table = dict[str, SiteInfo]


def check(
    edits: tuple[Edit, ...], reads: tuple[Read, ...], sites: Table, everything: Callable[[], Table]
) -> None:
    """Refuse unknown sites, layers, axes and positions, and values that cannot fit.

    Args:
        edits: The edits; numbers that are data of an outer transform are left to run time.
        reads: The captures.
        sites: The sites of the program.
        everything: All sites that the callable could offer; called only for a message.

    Raises:
        SiteError: a site, layer, axis or index that is not there.
        ShapeError: a value that does not fit.
    """
    names = [r.site for r in reads]
    if len(set(names)) < len(names):
        raise SiteError(
            f"captured twice: {sorted({n for n in names if names.count(n) > 1})}. Name each site once."
        )
    for asked in (*edits, *reads):
        if asked.site not in sites:
            raise _unknown(asked.site, everything())
        _check_place(asked, sites[asked.site])
    for edit in edits:
        _check_edit(edit, sites)
    for read in reads:
        _check_read(read, sites[read.site])
    if reads and reads[0].layers is not None and not any(sites[r.site].stacked for r in reads):
        raise SiteError(
            f"layers={reads[0].layers} was given, but {names} lie outside the layers. Leave it out."
        )


def _unknown(name: str, sites: Table) -> SiteError:
    have = ", ".join(f"`{n}`" for n in sites) or "none"
    if name in SITES:
        return SiteError(f"this function has no site `{name}`: {SITES[name].condition} Its sites: {have}.")
    also = [path for info in sites.values() for path in info.also]
    hint = did_you_mean(name, dict.fromkeys([*sites, *SITES, *also]))
    paths = (
        " Paths of modules name sites in models that were loaded from a checkpoint, where they hold the same."
    )
    said = paths if "{}" in name else ""
    return SiteError(f"no site is named `{name}`.{hint}{said} This function's sites: {have}.")


def _check_place(asked: Edit | Read, info: SiteInfo) -> None:
    what = asked.describe() if isinstance(asked, Edit) else f"capture of `{asked.site}`"
    for axis, index in asked.index.items():
        if axis not in info.axes:
            raise SiteError(
                f"{what}: site `{info.name}` has no axis `{axis}`; its axes are {info.axes}."
                f"{did_you_mean(axis, info.axes)}"
            )
        _check_numbers(what, axis, index, info.size(axis), info)
        looks_per_example = (
            info.n_batch > 0
            and index.ndim == 1
            and index.shape == info.local[info.n_batch - 1 : info.n_batch]
        )
        if looks_per_example and index.size > 1 and index.dtype != jnp.bool_ and axis not in asked.listed:
            raise ShapeError(
                f"{what}: `{axis}=` is an array of {index.size} indices for {index.size} examples. One per example is "
                f"{axis}=mechjax.per_example(array); all of these indices in every example is {axis}=list(array)."
            )
    if info.mapped is not None and info.spec is None and not _needs_no_partition(asked):
        raise SiteError(
            f"{what}: site `{info.name}` stands inside shard_map over {sorted(info.mapped.axes)}, where each device "
            "sees only its part, so indices, values and captures have no global meaning. Declare how it is "
            "partitioned: site(x, name, ..., spec=PartitionSpec(...))."
        )


def _check_numbers(what: str, axis: str, index: Array, size: int, info: SiteInfo) -> None:
    if index.dtype == jnp.bool_:
        if index.shape[-1] != size:
            raise ShapeError(
                f"{what}: the mask `{axis}=` has length {index.shape[-1]}; site `{info.name}` has {size} there."
            )
    elif is_concrete(index):
        numbers = whole(index)
        wrong = numbers[(numbers < -size) | (numbers >= size)]
        if wrong.size:
            raise SiteError(
                f"{what}: {axis} {wrong.ravel()[0]} is out of range; site `{info.name}` has {size} "
                f"(0 to {size - 1}, or -{size} to -1)."
            )


def _needs_no_partition(asked: Edit | Read) -> bool:
    if isinstance(asked, Read):
        return False
    return (
        not asked.index
        and asked.kind != "project_out"
        and all(jnp.ndim(v) == int(asked.per_layer) for v in asked.value)
    )


def _check_layers(what: str, info: SiteInfo) -> int:
    if not info.stacked:
        raise SiteError(f"{what}: site `{info.name}` is outside the layers, so it takes no layer.")
    if info.layers is None:
        raise SiteError(
            f"{what}: site `{info.name}` stands in a while_loop, so how many layers there are is not known. Say it: "
            "site(x, name, layer=i, layers=n)."
        )
    return info.layers


def _check_edit(edit: Edit, sites: Table) -> None:
    info, what = sites[edit.site], edit.describe()
    differentiated = [n for n in (f"{edit.site}@tangent", f"{edit.site}@cotangent") if n in sites]
    if differentiated and not edit.straight_through:
        raise SiteError(
            f"{what}: the function is already differentiated (it has `{differentiated[0]}`), so the edit's own "
            "derivative would be missed. Write grad(intervene(f, edits)) instead of intervene(grad(f), edits), or say "
            "straight_through=True."
        )
    if edit.layer is not None:
        _check_numbers(what, "layer", edit.layer, _check_layers(what, info), info)
        if is_concrete(edit.layer):
            _check_having(what, whole(edit.layer), info)
    if edit.per_layer:
        layers = _check_layers(what, info)
        rows = len(info.rows if edit.rows is None else edit.rows)
        for value in edit.value:
            if value.shape[:1] != (rows,):
                raise ShapeError(
                    f"{what}: with per_layer=True the value's first axis is the layer; it has shape {value.shape}, "
                    f"and site `{info.name}` has {len(info.rows)} layers."
                )
        _check_rows(edit, what, layers, info)
    if edit.kind not in RAW:
        for value in edit.value:
            aligned(value[0] if edit.per_layer else value, info, tuple(edit.index), what)
    elif edit.kind == "project_out":
        size = info.local[-1]
        if edit.value[0].shape[-1] != size:
            raise ShapeError(
                f"{what}: directions of length {edit.value[0].shape[-1]}; the site's last axis is {size}."
            )
        if info.spec is not None and axis_names(info.spec[-1]):
            raise SiteError(
                f"{what}: the last axis of site `{info.name}` is partitioned, so it cannot be projected."
            )


def _check_having(what: str, layers: np.ndarray, info: SiteInfo) -> None:
    """Layers that are asked for must be layers that have the site."""
    if info.having is None:
        return
    asked = np.flatnonzero(layers) if layers.dtype == np.bool_ else layers.ravel() % (info.layers or 1)
    missing = [int(i) for i in asked if i not in info.having]
    if missing:
        raise SiteError(
            f"{what}: layer {missing[0]} has no site `{info.name}`; layers {', '.join(map(str, info.having))} have."
        )


def _check_rows(edit: Edit, what: str, layers: int, info: SiteInfo) -> None:
    """A record of some layers serves only edits at those layers."""
    if edit.rows is None or edit.rows == info.rows:
        return
    asked = info.rows if edit.layer is None else None
    if edit.layer is not None and is_concrete(edit.layer) and edit.layer.dtype != jnp.bool_:
        asked = [int(i) % layers for i in np.atleast_1d(whole(edit.layer))]
    missing = [i for i in asked or () if i not in edit.rows]
    if missing:
        raise SiteError(
            f"{what}: the record holds layers {edit.rows} of `{edit.site}`, not layer {missing[0]}. Capture that "
            "layer too, or say layer= one of these."
        )


def _check_read(read: Read, info: SiteInfo) -> None:
    what = f"capture of `{read.site}`"
    if info.stacked:
        layers = _check_layers(what, info)
        wrong = [i for i in read.layers or () if not -layers <= i < layers]
        if wrong:
            raise SiteError(
                f"{what}: layer {wrong[0]} is out of range; there are {layers} (0 to {layers - 1})."
            )
        _check_having(what, np.asarray(read.layers or (), np.int64), info)
        rows = read.rows(info) or ()
        if len(set(rows)) < len(rows):
            raise SiteError(f"{what}: layers {read.layers} name one layer twice.")
    for axis, index in read.index.items():
        if index.dtype == jnp.bool_:
            raise ShapeError(
                f"{what}: `{axis}=` is a mask, whose size is data; give indices (np.flatnonzero(mask))."
            )
        if index.ndim - 1 > info.n_batch:
            raise ShapeError(
                f"{what}: `{axis}=` of shape {index.shape} is per example; the site is {info.describe()}."
            )
    if info.along is not None and read.reduce is not None:
        raise SiteError(
            f"{what}: site `{info.name}` is formed along `{info.along}`, one index at a time, so reduce= would never "
            f"see it whole. Capture it (with `{info.along}=`, a part of it) and reduce what comes out."
        )
    if (
        info.spec is not None
        and (read.index or read.reduce is not None)
        and any(axis_names(s) for s in info.spec)
    ):
        raise SiteError(
            f"{what}: site `{info.name}` is partitioned inside shard_map; capture it whole, then select."
        )
