"""The sites of a traced program: where they stand, their shapes, axes and layers."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex
from jax.extend.core import primitives as jp

from mechjax.base.errors import ShapeError, SiteError
from mechjax.transform import compat
from mechjax.transform.site import site_p

CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


@dataclass(frozen=True)
class Mapped:
    """The `shard_map` around a site: its mesh and the axes it makes manual."""

    mesh: Any
    axes: frozenset[str]


@dataclass(frozen=True)
class SiteInfo:
    """What is known of a site before anything runs.

    Attributes:
        name: Its name, with `@tangent` or `@cotangent` where it is one.
        axes: Names of its trailing dimensions.
        shape: Shape of one layer's value as a capture sees it: mapped axes first, then batch, then `axes`.
        local: Shape of one example's value as an edit sees it: without axes added by `vmap`; inside `shard_map` global.
        dtype: Its dtype.
        layers: How many layers there are; None for a site outside the layers.
        stacked: Whether the site belongs to layers at all.
        spec: Its partition inside `shard_map`, one entry per dimension of `local`; None where undeclared.
        mapped: The `shard_map` around it, if any.
        in_custom_rule: Whether it stands inside a `custom_jvp` or `custom_vjp` function.
        having: The layers that have the site, where not all do; None for all.
        also: Other names that it is asked for by, `{}` standing for the layer.
        starts: Axes of which a run holds only the indices from a number on; `shape` and `local` count all.
        along: The axis that a loop runs along, one index at a time; `shape` and `local` count all.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    local: tuple[int, ...]
    dtype: Any
    layers: int | None
    stacked: bool
    spec: tuple[Any, ...] | None
    mapped: Mapped | None
    in_custom_rule: bool
    having: tuple[int, ...] | None = None
    also: tuple[str, ...] = ()
    starts: tuple[tuple[str, int], ...] = ()
    along: str | None = None

    @property
    def steps(self) -> int:
        """How often it is met in each layer."""
        return 1 if self.along is None else self.size(self.along)

    @property
    def n_batch(self) -> int:
        """Number of batch dimensions in front of the named axes."""
        return len(self.local) - len(self.axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """The layers that have the site."""
        return tuple(range(self.layers or 0)) if self.having is None else self.having

    def size(self, axis: str) -> int:
        """Length of a named axis."""
        return self.local[self.n_batch + self.axes.index(axis)]

    @property
    def missing(self) -> tuple[int, ...]:
        """Per dimension of `local`, how many indices at its beginning the run does not hold."""
        starts = dict(self.starts)
        return (0,) * self.n_batch + tuple(starts.get(axis, 0) for axis in self.axes)

    def describe(self) -> str:
        """The value's axes and shape in words, for error messages."""
        names = ("batch",) * self.n_batch + self.axes
        return f"({', '.join(names)}) = {self.local}"


@dataclass(frozen=True)
class _Place:
    """What stands around an equation."""

    loops: tuple[int | None, ...] = ()  # lengths of the loops, None for a `while`
    mapped: Mapped | None = None
    custom: bool = False
    recomputing: bool = False

    def entering(self, eqn: Any) -> "_Place":
        loops, mapped = self.loops, self.mapped
        if eqn.primitive is jp.scan_p:
            loops = (*loops, eqn.params["length"])
        elif eqn.primitive is jp.while_p:
            loops = (*loops, None)
        elif eqn.primitive.name == "shard_map":
            mapped = Mapped(eqn.params["mesh"], compat.manual_axes(eqn.params))
        custom = self.custom or eqn.primitive.name in CUSTOM_RULES
        return _Place(loops, mapped, custom, self.recomputing or is_recomputation(eqn))


def site_name(eqn: Any) -> str | None:
    """The name of a site equation, with its kind; None for any other equation."""
    if eqn.primitive is not site_p:
        return None
    kind = eqn.params["kind"]
    return eqn.params["name"] if kind == "primal" else f"{eqn.params['name']}@{kind}"


def known_as(name: str, sites: Mapping[str, Any]) -> str:
    """The own name of a site of `sites`, given that or another name of it; any other name comes back as it is."""
    if name in sites:
        return name
    base, at, kind = name.partition("@")
    own = (site.partition("@")[0] for site, info in sites.items() if base in info.also)
    return next(own, base) + at + kind


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """The programs that an equation carries as parameters."""
    for value in eqn.params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, (jex.Jaxpr, jex.ClosedJaxpr)):
                yield item


def is_recomputation(eqn: Any) -> bool:
    """Whether the equation is the second forward of `jax.checkpoint`, whose sites were already met."""
    return bool(eqn.params.get("differentiated", False)) and "prevent_cse" in eqn.params


def site_table(closed_jaxpr: Any) -> dict[str, SiteInfo]:
    """Every site of a program by name.

    Raises:
        SiteError: one name is used for two activations.
    """
    occurrences: dict[str, list[SiteInfo]] = {}
    for name, occurrence in _walk(closed_jaxpr.jaxpr, _Place()):
        occurrences.setdefault(name, []).append(occurrence)
    table = {name: _merge(name, found) for name, found in occurrences.items()}
    _refuse_twice(_count(closed_jaxpr.jaxpr, False))
    return table


def recomputed(eqn: Any, recomputing: bool) -> bool:
    """Whether a site equation only repeats a forward that was already met."""
    return recomputing and eqn.params["kind"] == "primal"


def _walk(jaxpr: Any, place: _Place) -> Iterator[tuple[str, SiteInfo]]:
    for eqn in jaxpr.eqns:
        name = site_name(eqn)
        if name is not None and not recomputed(eqn, place.recomputing):
            yield name, _occurrence(name, eqn, place)
        inside = place.entering(eqn)
        for inner in inner_jaxprs(eqn):
            yield from _walk(getattr(inner, "jaxpr", inner), inside)


def _occurrence(name: str, eqn: Any, place: _Place) -> SiteInfo:
    params, aval = eqn.params, eqn.outvars[0].aval
    stacked, layers = len(eqn.invars) > 1 or bool(place.loops), params["layers"]
    if layers is None and place.loops and None not in place.loops:
        layers = math.prod(n for n in place.loops if n is not None)
    local, mapped_sizes = list(aval.shape), []
    for dim, _ in reversed(params["bdims"]):  # the outermost map was recorded last
        mapped_sizes.append(local.pop(dim))
    starts, axes = dict(params["starts"]), params["axes"]
    before = [0] * (len(local) - len(axes)) + [starts.get(axis, 0) for axis in axes]
    local = [n + more for n, more in zip(local, before, strict=True)]
    along = params["along"]
    if along is not None:
        local[len(local) - len(axes) + axes.index(along[0])] = along[1]
    spec = _full_spec(name, params["spec"], len(local))
    if place.mapped is not None and spec is not None:
        local = [n * _parts(place.mapped.mesh, entry) for n, entry in zip(local, spec, strict=True)]
    return SiteInfo(
        name, axes, (*mapped_sizes, *local), tuple(local), aval.dtype,
        layers, stacked, spec, place.mapped, place.custom, params["having"], params["also"],
        params["starts"], None if along is None else along[0],
    )  # fmt: skip


def _full_spec(name: str, spec: Any, ndim: int) -> tuple[Any, ...] | None:
    if spec is None:
        return None
    if len(spec) > ndim:
        raise ShapeError(f"site `{name}` declares spec={spec} for a value of {ndim} dimensions.")
    return (None,) * (ndim - len(spec)) + tuple(spec)


def axis_names(entry: Any) -> tuple[str, ...]:
    """Mesh axes of one entry of a partition."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _parts(mesh: Any, entry: Any) -> int:
    return math.prod(mesh.shape[a] for a in axis_names(entry))


def _merge(name: str, found: list[SiteInfo]) -> SiteInfo:
    first = found[0]
    for other in found[1:]:
        same = (first.axes, first.shape, first.dtype, first.stacked) == (
            other.axes,
            other.shape,
            other.dtype,
            other.stacked,
        )
        if not same:
            raise SiteError(
                f"site `{name}` names two different activations: {first.describe()} {first.dtype}"
                f"{' in layers' if first.stacked else ''} and {other.describe()} {other.dtype}"
                f"{' in layers' if other.stacked else ''}. Give each its own name."
            )
    if any(o.in_custom_rule for o in found):
        return SiteInfo(**{**first.__dict__, "in_custom_rule": True})
    return first


def _count(jaxpr: Any, recomputing: bool) -> dict[tuple[str, Any], int]:
    """How often each (name, layer) runs at most, where that is known; branches of a `cond` are alternatives."""
    total: dict[tuple[str, Any], int] = {}
    for eqn in jaxpr.eqns:
        name = site_name(eqn)
        operand = eqn.invars[1] if name is not None and len(eqn.invars) > 1 else None
        if (
            name is not None
            and not recomputed(eqn, recomputing)
            and (operand is None or isinstance(operand, jex.Literal))
        ):
            layer = None if operand is None else int(np.asarray(operand.val))
            total[name, layer] = total.get((name, layer), 0) + 1
        inside = recomputing or is_recomputation(eqn)
        counts = [_count(getattr(j, "jaxpr", j), inside) for j in inner_jaxprs(eqn)]
        pick = max if eqn.primitive is jp.cond_p else sum
        for key in {key for c in counts for key in c}:
            total[key] = total.get(key, 0) + pick([c.get(key, 0) for c in counts])
    return total


def _refuse_twice(counts: dict[tuple[str, Any], int]) -> None:
    for (name, layer), n in counts.items():
        if n > 1:
            where = "without a layer" if layer is None else f"at layer {layer}"
            raise SiteError(
                f"site `{name}` occurs {n} times {where}; a name stands for one activation per layer. Give each "
                f"occurrence its own name, or its own layer: site(x, {name!r}, layer=i, layers=n)."
            )


def table_text(table: dict[str, SiteInfo]) -> str:
    """The table as aligned text, one line per site."""
    rows = [("site", "layers", "axes", "shape", "dtype")]
    for info in table.values():
        names = ("batch",) * info.n_batch + info.axes
        layers = ("?" if info.layers is None else str(info.layers)) if info.stacked else "-"
        layers = layers if info.having is None else f"{len(info.having)} of {layers}"
        rows.append((info.name, layers, " ".join(names), str(info.shape), str(jax.numpy.dtype(info.dtype))))
    widths = [max(len(r[i]) for r in rows) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows)
