"""Which part of an activation an edit or a capture addresses: layers and named axes, as data.

An index along an axis is an integer array whose rank says what it means, never its size:
rank 0 is one index, rank 1 a list of indices (the same for every example), rank 2 and more `[*batch, k]` lists of
indices per example (`per_example` makes one of `[*batch]` positions). Booleans are masks of the same ranks. An array
(not a Python list) of as many indices as there are examples is refused: it looks like one per example, and is not.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Int

from mechjax.base.errors import ShapeError
from mechjax.transform.table import SiteInfo


def is_concrete(x: Any) -> bool:
    """Whether the numbers can be looked at now."""
    return not isinstance(x, Tracer)


def as_array(x: Any, what: str) -> Array:
    """`x` as a strongly typed array, so that new numbers never mean a new program.

    Python numbers become int32, float32 or bool; a weakly typed array becomes strongly typed.
    """
    if isinstance(x, jax.Array):
        return jax.lax.convert_element_type(x, x.dtype) if x.weak_type else x
    try:
        host = np.asarray(x)
    except ValueError as error:
        raise ShapeError(f"{what}: expected numbers of one shape, got {x!r} ({error}).") from None
    if host.dtype == object or host.dtype.kind not in "biufcV":
        raise ShapeError(f"{what}: expected numbers, got {x!r} of type {type(x).__name__}.")
    if host.dtype.kind in "iu" and host.dtype.itemsize == 8:
        host = host.astype(np.int32)
    if host.dtype == np.float64:
        host = host.astype(np.float32)
    with jax.ensure_compile_time_eval():  # stays concrete inside jit, so that it can be checked
        return jnp.asarray(host)


def as_index(x: Any, what: str) -> Int[Array, "..."] | Bool[Array, "..."]:
    """`x` as an int32 or boolean index array."""
    array = as_array(x, what)
    if array.dtype == jnp.bool_:
        if array.ndim == 0:
            raise ShapeError(
                f"{what}: a single boolean selects nothing; give an index or a mask along the axis."
            )
        return array
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ShapeError(f"{what}: an index must be integers or booleans, got {array.dtype} {x!r}.")
    return array.astype(jnp.int32)


def per_example(index: Any) -> Int[Array, "*batch 1"]:
    """One index per example, `[*batch]`, in the form that edits and captures read as such, `[*batch, 1]`."""
    return as_index(index, "per_example")[..., None]


def in_range(index: Array, size: int, start: int = 0) -> Bool[Array, ""]:
    """Whether every index lies in `-size .. size - 1`, as masks always do, and none before `start`."""
    if index.dtype == jnp.bool_:
        return ~index[..., :start].any()
    return jnp.all((index >= -size) & (index < size) & (jnp.where(index < 0, index + size, index) >= start))


def axis_mask(
    index: Array, info: SiteInfo, axis: str, shape: tuple[int, ...], offset: Any = 0
) -> Bool[Array, "..."]:
    """The addressed part along one axis, as a mask that broadcasts against a value of `shape`.

    Args:
        index: As the module describes.
        info: The site.
        axis: The name of the axis.
        shape: Shape of the value at hand (inside `shard_map` the local one).
        offset: Global index of the value's first element along the axis.

    Raises:
        ShapeError: a mask of the wrong length, or per-example indices at a value without those batch axes.
    """
    n_batch, size = info.n_batch, info.size(axis)
    dim = n_batch + info.axes.index(axis)
    if index.ndim - 1 > n_batch:
        raise ShapeError(
            f"`{axis}=` at site `{info.name}` has shape {index.shape}, that is indices per example, but the value "
            f"{info.describe()} has {n_batch} batch axes here. Give one list of indices, or map over the edit too."
        )
    here = jnp.arange(shape[dim], dtype=jnp.int32) + offset
    if index.dtype == jnp.bool_:
        if index.shape[-1] != size:
            raise ShapeError(
                f"`{axis}=` at site `{info.name}` is a mask of length {index.shape[-1]}; the axis has {size}."
            )
        mask = jnp.take(index, here, axis=-1)
    else:
        wanted = jnp.where(index < 0, index + size, index)
        mask = here == wanted if index.ndim == 0 else (here == wanted[..., None]).any(-2)
    lead, trailing = mask.shape[:-1], len(shape) - dim - 1
    return mask.reshape(*lead, *(1,) * (dim - n_batch), mask.shape[-1], *(1,) * trailing)


def take(x: Array, index: dict[str, Array], info: SiteInfo) -> Array:
    """The addressed part of `x`; an axis with a single index is dropped. Data out of range gives NaN."""
    axes = list(info.axes)
    for axis, idx in index.items():
        dim = x.ndim - len(axes) + axes.index(axis)
        size = x.shape[dim]
        wanted = jnp.where(idx < 0, idx + size, idx)
        wanted = jnp.where((idx < -size) | (wanted >= size), size, wanted)  # beyond the end: filled
        fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
        if idx.ndim <= 1:
            x = jnp.take(x, wanted, axis=dim, mode="fill", fill_value=fill)
        else:
            n_batch = x.ndim - len(axes)
            lead = (1,) * (n_batch - idx.ndim + 1)
            shape = (
                *lead,
                *idx.shape[:-1],
                *(1,) * (dim - n_batch),
                idx.shape[-1],
                *(1,) * (x.ndim - dim - 1),
            )
            x = jnp.take_along_axis(x, wanted.reshape(shape), axis=dim, mode="fill", fill_value=fill)
        if idx.ndim == 0:
            axes.remove(axis)
    return x


def kept_axes(axes: tuple[str, ...], index: dict[str, Array]) -> tuple[str, ...]:
    """The axes that `take` leaves."""
    return tuple(a for a in axes if a not in index or index[a].ndim > 0)


def layer_match(layer: Array | None, at: Any, layers: int | None) -> tuple[Any, Array]:
    """Whether the layer `at` is addressed, and the hit flags to set (one per layer asked for).

    `at` is the layer that is running, `layers` how many there are.
    """
    if layer is None:
        return True, jnp.bool_(True)
    if layer.dtype == jnp.bool_:
        mask = jnp.take(layer, at, mode="fill", fill_value=False)
        return mask, (jnp.arange(layer.shape[0], dtype=jnp.int32) == at)
    wanted = layer if layers is None else jnp.where(layer < 0, layer + layers, layer)
    hit = wanted == at
    return (hit if hit.ndim == 0 else hit.any()), hit


def no_hits(layer: Array | None) -> Array:
    """Hit flags before anything ran; layers that a mask leaves out count as hit."""
    if layer is None or layer.ndim == 0:
        return jnp.bool_(False)
    return ~layer if layer.dtype == jnp.bool_ else jnp.zeros(layer.shape, bool)


def aligned(value: Array, info: SiteInfo, indexed: tuple[str, ...], what: str) -> tuple[int, ...]:
    """The shape, of the value's full rank, in which `value` broadcasts against the site.

    A value has the site's own axes, right-aligned; indexed axes may be whole, of size 1, or all absent.

    Raises:
        ShapeError: no reading fits, or two do and they differ.
    """
    full, shape = info.local, value.shape
    removed = [info.n_batch + info.axes.index(a) for a in indexed]
    short = tuple(n for i, n in enumerate(full) if i not in removed)
    readings = set()
    if _fits(shape, full):
        readings.add((1,) * (len(full) - len(shape)) + shape)
    if removed and len(shape) < len(full) and _fits(shape, short):
        rest = iter((1,) * (len(short) - len(shape)) + shape)
        readings.add(tuple(1 if i in removed else next(rest) for i in range(len(full))))
    if len(readings) == 1:
        return readings.pop()
    names = ("batch",) * info.n_batch + info.axes
    without = tuple(a for i, a in enumerate(names) if i not in removed)
    expected = f"{info.describe()}" + (
        f", or without what is indexed ({', '.join(without)}) = {short}" if removed else ""
    )
    if readings:
        raise ShapeError(
            f"{what}: a value of shape {shape} can be read in two ways at site `{info.name}`: as the last axes of "
            f"{expected}. Give it all {len(full)} axes {names} (size 1 where it does not vary)."
        )
    hint = " If its first axis is the layer, say per_layer=True." if len(shape) == len(full) + 1 else ""
    raise ShapeError(
        f"{what}: a value of shape {shape} does not fit site `{info.name}`, which has {expected}.{hint}"
    )


def _fits(shape: tuple[int, ...], full: tuple[int, ...]) -> bool:
    return len(shape) <= len(full) and all(
        n in (1, m) for n, m in zip(reversed(shape), reversed(full), strict=False)
    )
