"""Edits: what happens to an activation, as data.

An edit is a pytree. Its constructor stores every number (value, layer, index, strength) as a strongly typed array;
which site, which kind and which selectors are present is static. So new numbers never recompile, and `jax.vmap` over
edits is a sweep.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from mechjax.base.catalogue import spelled_out
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.base.meshes import on_any_mesh
from mechjax.transform.select import as_array, as_index, is_concrete
from mechjax.transform.static import hold

OnMiss = Literal["nan", "raise", "allow"]


class Edit(eqx.Module):
    """One change at one site; made by the constructors of this module.

    Attributes:
        site: The site's name (static).
        kind: Which change (static).
        value: The arrays of the change; with `per_layer` each has a leading layer axis.
        layer: None for every layer, else an integer, a list or a mask.
        index: Axis name -> integer, list, mask, or `[*batch, k]` lists per example.
        fn: The function of `apply`.
        per_layer: Whether the value has one row per layer (static).
        rows: The layers whose rows the value holds; None for all, in order (static).
        on_miss: What a miss at run time does: "nan", "raise" or "allow" (static).
        straight_through: Allows editing a primal site of a differentiated program (static).
        listed: The axes whose indices came as a Python list, which cannot be meant per example (static).
    """

    site: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    value: tuple[Any, ...] = ()
    layer: Array | None = None
    index: dict[str, Array] = eqx.field(default_factory=dict)
    fn: Any = None
    per_layer: bool = eqx.field(static=True, default=False)
    rows: tuple[int, ...] | None = eqx.field(static=True, default=None)
    on_miss: str = eqx.field(static=True, default="nan")
    straight_through: bool = eqx.field(static=True, default=False)
    listed: tuple[str, ...] = eqx.field(static=True, default=())

    def describe(self) -> str:
        """The edit in words, for messages: "`replace` at `z`, layer 1, head 4"."""
        parts = [] if self.layer is None else [f"layer {_shown(self.layer)}"]
        parts += [f"{axis} {_shown(i)}" for axis, i in self.index.items()]
        return ", ".join([f"`{self.kind}` at `{self.site}`", *parts])


def _shown(x: Array) -> str:
    return (
        str(x.tolist())
        if is_concrete(x) and not isinstance(x, jax.ShapeDtypeStruct) and x.size < 9
        else "<data>"
    )


def _edit(kind: str, site: str, value: tuple[Any, ...] = (), *, layer: Any = None, on_miss: OnMiss = "nan",
          straight_through: bool = False, per_layer: bool = False, rows: tuple[int, ...] | None = None,
          fn: Any = None, **index: Any) -> Edit:  # fmt: skip
    name, at = spelled_out(site)
    if at is not None:
        if layer is not None:
            raise SiteError(
                f"`{site}` already says layer {at}, but layer={layer!r} was given too. Give one of them."
            )
        layer = at
    if on_miss not in ("nan", "raise", "allow"):
        raise ArgumentError(f"on_miss={on_miss!r}: expected 'nan', 'raise' or 'allow'.")
    what = f"`{kind}` at `{site}`"
    if layer is not None:
        layer = as_index(layer, f"{what}, layer")
        if layer.ndim > 1:
            raise ShapeError(
                f"{what}: layer has shape {layer.shape}; give one layer, a list of layers or a mask."
            )
    chosen = {axis: as_index(i, f"{what}, {axis}") for axis, i in index.items() if i is not None}
    listed = tuple(axis for axis in chosen if isinstance(index[axis], (list, tuple)))
    return Edit(name, kind, value, layer, chosen, fn, per_layer, rows, on_miss, straight_through, listed)


def _recorded(
    kind: str, site: str, value: Any, per_layer: bool
) -> tuple[Array, bool, tuple[int, ...] | None]:
    """The array of `site` in a record, with whether it is per layer and for which layers; an array as it is."""
    if isinstance(value, Mapping):
        return value.layered(spelled_out(site)[0])  # type: ignore[attr-defined]
    return as_array(value, f"`{kind}` at `{site}`, value"), per_layer, None


def replace(site: str, value: Any, *, per_layer: bool = False, **where: Any) -> Edit:
    """Put `value` where the activation was.

    Args:
        site: Name of the site.
        value: An array with the site's own axes (indexed axes whole, of size 1, or absent), or a captured record.
        per_layer: Whether the value's first axis is the layer.
        **where: `layer=` and any axis of the site (`head=`, `pos=`, ...): None, an int, a list, a mask, or
            `[*batch, k]` indices per example. Also `on_miss=` ("nan", "raise", "allow") and `straight_through=`.

    Returns:
        The edit.
    """
    array, per_layer, rows = _recorded("replace", site, value, per_layer)
    return _edit("replace", site, (array,), per_layer=per_layer, rows=rows, **where)


def add(site: str, value: Any, *, strength: Any = 1.0, per_layer: bool = False, **where: Any) -> Edit:
    """Add `strength * value` (steering). Arguments as in `replace`; `strength` is a number."""
    array, per_layer, rows = _recorded("add", site, value, per_layer)
    factor = as_array(strength, f"`add` at `{site}`, strength")
    if factor.ndim:
        raise ShapeError(
            f"`add` at `{site}`: strength must be one number, got shape {factor.shape}; scale the value."
        )
    return _edit("add", site, (array * factor.astype(array.dtype),), per_layer=per_layer, rows=rows, **where)


def scale(site: str, factor: Any, *, per_layer: bool = False, **where: Any) -> Edit:
    """Multiply by `factor`, a number or an array with the site's axes."""
    array, per_layer, rows = _recorded("scale", site, factor, per_layer)
    return _edit("scale", site, (array,), per_layer=per_layer, rows=rows, **where)


def zero(site: str, **where: Any) -> Edit:
    """Put zero (zero ablation)."""
    return _edit("zero", site, **where)


def mean_ablate(site: str, mean: Any, *, per_layer: bool = False, **where: Any) -> Edit:
    """Put a mean recorded by `means` (mean ablation), or an array like `replace` takes."""
    array, per_layer, rows = _recorded("mean_ablate", site, mean, per_layer)
    return _edit("mean_ablate", site, (array,), per_layer=per_layer, rows=rows, **where)


@on_any_mesh
def resample(site: str, acts: Any, *, key: PRNGKeyArray, per_layer: bool = False, **where: Any) -> Edit:
    """Put the activation of another, random example (resample ablation; Chan et al. 2022, causal scrubbing).

    The batch is permuted by one random cycle, so that no example keeps its own.

    Args:
        site: Name of the site.
        acts: A captured record, or an array whose first axis (after the layer, with `per_layer`) is the batch.
        key: Random key.
        per_layer: Whether an array's first axis is the layer.
        **where: As in `replace`.

    Raises:
        ArgumentError: fewer than two examples.
    """
    array, per_layer, rows = _recorded("resample", site, acts, per_layer)
    axis = int(per_layer)
    n = array.shape[axis] if array.ndim > axis else 1
    if n < 2:
        raise ArgumentError(f"`resample` at `{site}`: needs two examples or more to exchange, got {n}.")
    order = jax.random.permutation(key, n)
    source = jnp.zeros(n, order.dtype).at[order].set(jnp.roll(order, 1))
    return _edit("resample", site, (jnp.take(array, source, axis),), per_layer=per_layer, rows=rows, **where)


@on_any_mesh
def project_out(site: str, directions: Any, *, per_layer: bool = False, **where: Any) -> Edit:
    """Remove the component along a direction `[d]`, or in the span of directions `[k, d]`, of the last axis.

    Directions need not have length one nor be orthogonal. With `per_layer`, `[layer, d]` or `[layer, k, d]`.

    Raises:
        ShapeError: another rank.
        ArgumentError: a direction that is zero.
    """
    array, per_layer, rows = _recorded("project_out", site, directions, per_layer)
    rank = array.ndim - int(per_layer)
    if rank not in (1, 2):
        raise ShapeError(
            f"`project_out` at `{site}`: directions must be [d] or [k, d]{' after the layer' * per_layer}, "
            f"got shape {array.shape}."
        )
    basis = array[..., None, :] if rank == 1 else array
    if is_concrete(basis) and not bool(jnp.all(jnp.any(basis != 0, -1))):
        raise ArgumentError(
            f"`project_out` at `{site}`: a direction is zero, so there is nothing to project out."
        )
    return _edit("project_out", site, (_orthonormal(basis),), per_layer=per_layer, rows=rows, **where)


def _orthonormal(basis: Array) -> Array:
    """An orthonormal basis `[..., k, d]` of the span of the rows; vectors that depend on others become zero."""
    _, s, vh = jnp.linalg.svd(basis.astype(jnp.float32), full_matrices=False)
    keep = s > s[..., :1] * basis.shape[-1] * jnp.finfo(jnp.float32).eps
    return jnp.where(keep[..., None], vh, 0.0)


def clamp(site: str, low: Any = None, high: Any = None, **where: Any) -> Edit:
    """Bound the activation to `low .. high`; either may be None."""
    if low is None and high is None:
        raise ArgumentError(f"`clamp` at `{site}`: give low=, high= or both.")
    bounds = [(-jnp.inf if low is None else low), (jnp.inf if high is None else high)]
    return _edit("clamp", site, tuple(as_array(b, f"`clamp` at `{site}`") for b in bounds), **where)


def apply(site: str, fn: Callable[..., Array], *data: Any, **where: Any) -> Edit:
    """Put `fn(x, info, *data)`, under `lax.cond` on the layer: it costs only the layers it is asked at.

    Args:
        site: Name of the site.
        fn: `fn(x, info, *data)` returns a value of x's shape. `info` has `.name`, `.axes`, `.layer`, and in `.layers`
            how many there are. A plain function is static by identity: a fresh lambda at every call recompiles (and
            warns); pass numbers as `data`. A callable that is a pytree with arrays (a dictionary, an eqx.Module) is
            data. Of a site that a loop runs along (a Mamba's `state`) it sees one index at a time, that axis of length
            1.
        *data: Arrays or pytrees handed on to `fn`.
        **where: As in `replace`.
    """
    if not callable(fn):
        raise ArgumentError(f"`apply` at `{site}`: fn must be callable, got {type(fn).__name__}.")
    leaves = jax.tree.map(
        lambda d: as_array(d, f"`apply` at `{site}`, data") if eqx.is_array_like(d) else d, data
    )
    return _edit("apply", site, leaves, fn=hold(fn), **where)
