"""What is asked of a program: sites to read, edits to make, and the state that carries both through it."""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from mechjax.transform.captured import Captured
from mechjax.transform.edits import Edit
from mechjax.transform.select import kept_axes, no_hits, take
from mechjax.transform.table import SiteInfo, inner_jaxprs, recomputed, site_name


class Read(eqx.Module):
    """One site to capture.

    Attributes:
        site: Its name (static).
        layers: The layers asked for; None for all (static).
        index: Axis name -> the part to keep, as `select.take` reads it.
        reduce: `reduce(x, info)` applied inside the program, so that only its result is kept; or None.
        listed: The axes whose indices came as a Python list (static).
    """

    site: str = eqx.field(static=True)
    layers: tuple[int, ...] | None = eqx.field(static=True, default=None)
    index: dict[str, Array] = eqx.field(default_factory=dict)
    reduce: Any = None
    listed: tuple[str, ...] = eqx.field(static=True, default=())

    def rows(self, info: SiteInfo) -> tuple[int, ...] | None:
        """The layers of the captured rows; None for a site outside the layers."""
        if not info.stacked or info.layers is None:
            return None
        if self.layers is None:
            return info.rows
        return tuple(i + info.layers if i < 0 else i for i in self.layers)

    def value(self, x: Array, info: SiteInfo, layer: Any) -> Array:
        """The part of one example's activation that is kept."""
        if any(info.missing) and x.shape != info.local:
            fill = jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else 0
            x = jnp.pad(x, [(n, 0) for n in info.missing], constant_values=fill)
        kept = take(x, self.beside(info), info)
        return (
            kept
            if self.reduce is None
            else jnp.asarray(self.reduce(kept, At(info.name, info.axes, layer, info.layers)))
        )

    def like(self, info: SiteInfo) -> Any:
        """Shape and dtype of what is kept of one example's whole activation."""
        whole = jax.ShapeDtypeStruct(info.local, info.dtype)
        kept = jax.eval_shape(lambda x: self.value(x, info, jnp.int32(0)), whole)
        if info.along not in self.index:
            return kept
        looped, axes = {info.along: self.index[info.along]}, kept_axes(info.axes, self.beside(info))
        return jax.eval_shape(lambda x: take(x, looped, replace(info, axes=axes)), kept)

    def beside(self, info: SiteInfo) -> dict[str, Array]:
        """The parts of axes to keep, but of that which a loop runs along."""
        return {axis: index for axis, index in self.index.items() if axis != info.along}

    def running(self, info: SiteInfo) -> int | None:
        """The dimension, counted from the last, that is kept whole while a loop runs along it."""
        if info.along is None or info.along in self.index:
            return None
        axes = kept_axes(info.axes, self.beside(info))
        return axes.index(info.along) - len(axes)

    def merged(self, old: Array, new: Array, info: SiteInfo, at: Any) -> Array:
        """What is kept, after what a loop met at index `at` of the axis that it runs along."""
        if info.along not in self.index:
            return new
        index, size = self.index[info.along], info.size(info.along)
        axes = kept_axes(info.axes, self.beside(info))
        before = axes.index(info.along)
        after = len(axes) - before - 1
        here = jnp.where(index < 0, index + size, index) == at
        if index.ndim == 0:
            return jnp.where(here, new.squeeze(new.ndim - after - 1), old)
        per_example = (1,) * before if index.ndim > 1 else ()
        here = here.reshape(*here.shape[:-1], *per_example, here.shape[-1], *(1,) * after)
        return jnp.where(here, new, old)

    def captured(self, info: SiteInfo) -> Captured:
        """What a record says of it: no axes of its own where a reducer made it."""
        axes = () if self.reduce is not None else kept_axes(info.axes, self.index)
        return Captured(self.site, axes, self.rows(info), info.also)


@dataclass(frozen=True)
class At:
    """Where an `apply` or a reducer is called: the site, its axes, the running layer (traced), and their number."""

    name: str
    axes: tuple[str, ...]
    layer: Any
    layers: int | None


class State(eqx.Module):
    """What runs along through every loop and branch.

    Attributes:
        buffers: Site -> captured rows so far; NaN where nothing ran.
        counts: Site -> how often each row was written; in a loop along an axis, once at each index.
        hits: Per edit, whether it took hold.
    """

    buffers: dict[str, Array]
    counts: dict[str, Array]
    hits: tuple[Array, ...]


class Env(eqx.Module):
    """The arrays that an equation may need besides its operands: the edits' numbers and the loop's counter."""

    numbers: Any
    counter: Any = None


class Request:
    """The static part of what is asked, with what is remembered of the program's parts."""

    def __init__(self, sites: dict[str, SiteInfo], edits: tuple[Edit, ...], reads: tuple[Read, ...]) -> None:
        self.sites = sites
        self.numbers, self._static = eqx.partition((edits, reads), eqx.is_array)
        self.edited = frozenset(e.site for e in edits)
        self.read = frozenset(r.site for r in reads)
        self.recomputing = False
        self._touched: dict[int, bool] = {}
        self._kept: list[Any] = []  # programs are remembered by id, so they must live
        self.runs: dict[int, Any] = {}

    def asked(self, numbers: Any) -> tuple[tuple[Edit, ...], tuple[Read, ...]]:
        """The edits and reads, with their numbers."""
        return eqx.combine(numbers, self._static)

    def wants(self, eqn: Any) -> bool:
        """Whether the equation is a site that is asked for."""
        name = site_name(eqn)
        return name is not None and (name in self.edited or name in self.read)

    def touches(self, jaxpr: Any) -> bool:
        """Whether a program has a site that is asked for, at any depth."""
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if id(jaxpr) not in self._touched:
            self.keep(jaxpr)
            self._touched[id(jaxpr)] = any(
                self.wants(e) or any(self.touches(inner) for inner in inner_jaxprs(e)) for e in jaxpr.eqns
            )
        return self._touched[id(jaxpr)]

    def keep(self, jaxpr: Any) -> None:
        """Keep a program alive as long as what is remembered of it."""
        self._kept.append(jaxpr)

    def reads_here(self, eqn: Any) -> bool:
        """Whether the site equation is to be captured (not, where it only repeats a forward)."""
        return site_name(eqn) in self.read and not recomputed(eqn, self.recomputing)


def blank_state(request: Request, numbers: Any) -> State:
    """The state before anything ran: NaN rows, no hits."""
    edits, reads = request.asked(numbers)
    buffers, counts = {}, {}
    for read in reads:
        info = request.sites[read.site]
        rows = read.rows(info)
        n = () if rows is None else (len(rows),)
        mapped = info.shape[: len(info.shape) - len(info.local)]
        kept = read.like(info)
        fill = jnp.nan if jnp.issubdtype(kept.dtype, jnp.inexact) else 0
        buffers[read.site] = jnp.full((*n, *mapped, *kept.shape), fill, kept.dtype)
        counts[read.site] = jnp.zeros(n, jnp.int32)
    return State(buffers, counts, tuple(no_hits(e.layer) for e in edits))


def write_row(read: Read, info: SiteInfo, at: Any, buffer: Array, count: Array, value: Array,
              layer: Any) -> tuple[Array, Array]:  # fmt: skip
    """The buffer with the row of `layer` written, where it is asked for; `at` as in `Read.merged`.

    The row is read, selected and written back, which XLA does in place; a scatter would copy. A row that is written a
    second time becomes NaN: a name stands for one activation per layer. (Integers have no NaN; they raise at the end.)
    """
    rows, layers = read.rows(info), info.layers
    if rows is None:
        return value.astype(buffer.dtype), count + 1
    slots = np.full(layers or len(rows), -1, np.int32)
    slots[list(rows)] = np.arange(len(rows), dtype=np.int32)
    everything = len(rows) == len(slots) and rows == tuple(range(len(rows)))
    slot = (
        jnp.asarray(layer) if everything else jnp.take(jnp.asarray(slots), layer, mode="fill", fill_value=-1)
    )
    row = jnp.maximum(slot, 0).astype(jnp.int32)
    starts, sizes = [row] + [jnp.int32(0)] * (buffer.ndim - 1), [1, *buffer.shape[1:]]
    if (running := read.running(info)) is not None:  # of its row, only what this step gives
        starts[running], sizes[running] = at, 1
    old = jax.lax.dynamic_slice(buffer, starts, sizes)[0]
    new = read.merged(old, value.astype(buffer.dtype), info, at)
    if jnp.issubdtype(buffer.dtype, jnp.inexact):
        new = jnp.where(count[row] >= info.steps, jnp.nan, new).astype(buffer.dtype)
    new = new if everything else jnp.where(slot >= 0, new, old)
    written = jax.lax.dynamic_update_slice(buffer, new[None], starts)
    return written, count + (jnp.arange(len(rows), dtype=jnp.int32) == slot).astype(jnp.int32)
