"""How an edit changes an activation: one table of changes, one place that selects layer and axes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ShapeError
from mechjax.transform.edits import Edit
from mechjax.transform.request import At
from mechjax.transform.select import aligned, axis_mask, in_range, layer_match
from mechjax.transform.static import unhold
from mechjax.transform.table import SiteInfo


def _project_out(x: Array, basis: Array) -> Array:
    # The products run in float32 at highest precision: what is left along a direction should be rounding, not bf16.
    wide = x.astype(jnp.float32) if x.dtype.itemsize < jnp.dtype(jnp.float32).itemsize else x
    basis = basis.astype(wide.dtype)
    along = jnp.einsum("...d,kd->...k", wide, basis, precision=jax.lax.Precision.HIGHEST)
    removed = jnp.einsum("...k,kd->...d", along, basis, precision=jax.lax.Precision.HIGHEST)
    return (wide - removed).astype(x.dtype)


CHANGES: dict[str, Callable[..., Array]] = {
    "replace": lambda x, value: value,
    "mean_ablate": lambda x, value: value,
    "resample": lambda x, value: value,
    "add": lambda x, value: x + value,
    "scale": lambda x, value: x * value,
    "zero": jnp.zeros_like,
    "clamp": jnp.clip,
    "project_out": _project_out,
}
RAW = frozenset({"apply", "project_out"})  # kinds whose values do not have the site's axes


def change(edit: Edit, x: Array, layer: Any, info: SiteInfo, offsets: tuple[Any, ...]) -> tuple[Array, Array]:
    """The activation after `edit`, and its hit flags.

    Args:
        edit: The edit, with its numbers.
        x: One example's activation (inside `shard_map` the local part).
        layer: The running layer, or None.
        info: The site.
        offsets: Per dimension of `x`, the global index of its first element.
    """
    match, hit = layer_match(edit.layer, layer, info.layers)
    mask, ok = jnp.bool_(True), jnp.bool_(True)
    for axis, index in edit.index.items():
        dim = info.n_batch + info.axes.index(axis)
        mask = mask & axis_mask(index, info, axis, x.shape, offsets[dim])
        ok = ok & in_range(index, info.size(axis), dict(info.starts).get(axis, 0))
    ok = ok & all(axis in edit.index for axis, _ in info.starts if axis in info.axes)
    if edit.rows is not None and layer is not None:
        ok = ok & (jnp.asarray(edit.rows, jnp.int32) == layer).any()
    values = [_value(edit, v, x, layer, info, offsets) for v in edit.value] if edit.kind != "apply" else []

    def changed(x: Array) -> Array:
        if edit.kind == "apply":
            return _applied(edit, x, layer, info)
        return CHANGES[edit.kind](x, *values)

    if edit.layer is None:
        return jnp.where(mask, changed(x), x), hit & ok
    if edit.kind == "apply":  # costly, so only where it is asked for; the rest select, which is free
        return jnp.where(mask, jax.lax.cond(match, changed, lambda x: x, x), x), hit & ok
    return jnp.where(match & mask, changed(x), x), hit & ok


def _applied(edit: Edit, x: Array, layer: Any, info: SiteInfo) -> Array:
    y = jnp.asarray(unhold(edit.fn)(x, At(info.name, info.axes, layer, info.layers), *edit.value))
    if y.shape != x.shape:
        raise ShapeError(
            f"{edit.describe()}: the function returned shape {y.shape} for an activation of shape {x.shape}; "
            "it must return the same shape."
        )
    _check_dtype(edit, y, x)
    return y.astype(x.dtype)


def _check_dtype(edit: Edit, value: Array, x: Array) -> None:
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    order = [next(i for i, kind in enumerate(kinds) if jnp.issubdtype(a.dtype, kind)) for a in (value, x)]
    if order[0] > order[1]:
        raise ShapeError(
            f"{edit.describe()}: a value of dtype {value.dtype} would lose its fraction at site `{edit.site}` of dtype "
            f"{x.dtype}. Convert it first."
        )


def _value(edit: Edit, value: Array, x: Array, layer: Any, info: SiteInfo, offsets: tuple[Any, ...]) -> Array:
    """One array of the edit, for the running layer, in the activation's rank and dtype."""
    if edit.per_layer:
        at = layer
        held = info.having if edit.rows is None else edit.rows
        if held is not None:  # row of each layer; layers without one are refused before, or missed
            rows = [held.index(i) if i in held else 0 for i in range(info.layers or 0)]
            at = jnp.take(jnp.asarray(rows, jnp.int32), layer)
        value = jax.lax.dynamic_index_in_dim(value, at, 0, keepdims=False)
    _check_dtype(edit, value, x)
    if edit.kind in RAW:
        return value
    value = value.reshape(aligned(value, info, tuple(edit.index), edit.describe()))
    for dim, (n, whole, part) in enumerate(zip(value.shape, info.local, x.shape, strict=True)):
        if n > 1 and whole != part:  # inside shard_map: this device's part of the value
            value = jax.lax.dynamic_slice_in_dim(value, offsets[dim], part, dim)
    return value.astype(x.dtype)
