"""`capture`, `intervene`, `run`, `list_sites`: transforms of functions, like `grad` and `vmap`.

Laws (each a property test in `tests/laws`):
1. Untransformed, sites cost nothing. 2. `intervene(f, [])` is `f`; an edit changes nothing upstream or beside it.
3. Capturing where a value was put returns the value. 4. Edits at distinct sites commute, at one site they apply in
order; a capture reads what leaves the site. 5. Transforms commute with jit, vmap, scan, remat. 6. Layout does not
show. 7. Nothing is silent. 8. Edits are data.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.catalogue import spelled_out
from mechjax.base.errors import ArgumentError, JitError, SiteError, did_you_mean
from mechjax.base.meshes import on_any_mesh
from mechjax.transform import log
from mechjax.transform.captured import Activations
from mechjax.transform.check import check
from mechjax.transform.context import EVERYTHING
from mechjax.transform.edits import Edit
from mechjax.transform.evaluate import evaluate
from mechjax.transform.halt import halt_if
from mechjax.transform.program import Program, trace
from mechjax.transform.request import Env, Read, Request, State, blank_state
from mechjax.transform.select import as_index
from mechjax.transform.static import hold, with_static
from mechjax.transform.table import SiteInfo, known_as, table_text


class Transformed(eqx.Module):
    """A callable with edits and captures; made by `capture` and `intervene`.

    It compiles itself, once per shape: inside a user's `jit` it is inlined. Arrays of the callable and of the edits
    are arguments of the program.
    """

    fn: Any
    edits: tuple[Edit, ...] = ()
    reads: tuple[Read, ...] = ()

    @on_any_mesh
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with its edits and captures.

        Returns:
            The function's output; with captures, `(output, activations)`.
        """
        out, acts, _ = self._run(args, kwargs, judge=True)
        return (out, acts) if self.reads else out

    @on_any_mesh
    def observe(self, *args: Any, **kwargs: Any) -> tuple[Any, Activations, tuple[Array, ...]]:
        """The output, the activations, and whether each edit took hold, which here has no consequence.

        For one call of several, where an edit needs to take hold in some: `settle` then judges all.
        """
        return self._run(args, kwargs, judge=False)

    def sites(self, *args: Any, **kwargs: Any) -> dict[str, SiteInfo]:
        """The sites of a call, once its edits and captures are checked. Zero FLOPs.

        Raises:
            SiteError: a site, layer, axis or index that is not there.
            ShapeError: a value that does not fit.
        """
        return self._checked(args, kwargs)[0].sites

    def _checked(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, list[Any], tuple[Edit, ...], tuple[Read, ...]]:
        """The program, its data, and the edits and captures by the sites' own names."""
        names = frozenset(x.site.partition("@")[0] for x in (*self.edits, *self.reads))
        program, data = trace(self.fn, args, kwargs, names)
        edits, reads = (
            tuple(with_static(x, site=known_as(x.site, program.sites)) for x in asked)
            for asked in (self.edits, self.reads)
        )
        check(edits, reads, program.sites,
              lambda: trace(self.fn, args, kwargs, EVERYTHING)[0].sites)  # fmt: skip
        return program, data, edits, reads

    def _run(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, judge: bool
    ) -> tuple[Any, Activations, tuple[Array, ...]]:
        program, data, edits, reads = self._checked(args, kwargs)
        outs, state = _evaluated(program, program.consts, data, edits, reads, judge)
        sites = tuple(read.captured(program.sites[read.site]) for read in reads)
        ran = {name: count > 0 for name, count in state.counts.items()}
        return program.rebuild(outs), Activations(state.buffers, ran, sites), state.hits

    def __hash__(self) -> int:
        raise JitError(
            "a transformed function holds arrays, so JAX cannot use it as a cache key: jax.jit(capture(model, ...)) "
            "would bake them in as constants. Use equinox.filter_jit(...), or pass it as an argument: "
            "jax.jit(lambda f, x: f(x))(transformed, x). It also compiles itself when called."
        )


@eqx.filter_jit
def _evaluated(
    program: Program, consts: Any, data: Any, edits: Any, reads: Any, judge: bool
) -> tuple[list[Any], State]:
    log.record(program, data, edits, reads)
    request = Request(program.sites, edits, reads)
    start = blank_state(request, request.numbers)
    outs, state = evaluate(request, program.jaxpr, consts, data, Env(request.numbers), start)
    buffers = _once(reads, state, program.sites)
    if judge:
        outs = [jnp.asarray(out) for out in outs]
        outs, buffers = settle(edits, state.hits, (outs, buffers))
    return outs, State(buffers, state.counts, state.hits)


def _once(reads: Any, state: State, sites: dict[str, SiteInfo]) -> dict[str, Array]:
    """The captured rows, of which none was written twice; rows of floats that were are NaN already."""
    buffers = dict(state.buffers)
    for read in reads:
        if not jnp.issubdtype(buffers[read.site].dtype, jnp.inexact):
            twice = (state.counts[read.site] > sites[read.site].steps).any()
            message = (
                f"site `{read.site}` ran twice at one layer; a name stands for one activation per layer."
            )
            buffers[read.site] = halt_if(buffers[read.site], twice, message)
    return buffers


def settle(edits: Sequence[Edit], hits: Sequence[Array], outs: Any) -> Any:
    """Nothing is silent: an edit that never took hold turns what came out into NaN, or raises.

    What cannot hold NaN raises, but not on TPUs, which cannot: `halt_if` says what stands there instead.

    Args:
        edits: The edits.
        hits: Whether each took hold (at each of its layers).
        outs: A pytree of arrays, which comes back as it is where all did.
    """
    judged = [(e, h.all()) for e, h in zip(edits, hits, strict=True) if e.on_miss != "allow"]
    if not judged:
        return outs
    missed = jnp.stack([~h for _, h in judged])
    message = (
        f"an edit never took hold ({'; '.join(e.describe() for e, _ in judged)}): its layer or index is out of range, "
        "lies before the start of a resumed run, or stands in a branch or step that was not run. Say "
        "on_miss='allow' where that is meant."
    )
    factor = jnp.where(missed.any(), jnp.nan, 1.0)
    # The edit's own value must feel the miss too: without this term its gradient would be a silent zero.
    ghost = sum((jnp.where(h, 0.0, jnp.nan) * _total(e.value) for e, h in judged), jnp.float32(0.0))
    loud = any(e.on_miss == "raise" for e, _ in judged)

    def poisoned(x: Any) -> Any:
        if jnp.issubdtype(x.dtype, jnp.inexact):
            x = x * factor.astype(x.dtype) + ghost.astype(x.dtype)
            return halt_if(x, missed.any(), message) if loud else x
        if jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_:
            return halt_if(x, missed.any(), message)
        return x

    return jax.tree.map(poisoned, outs)


def _total(value: Any) -> Array:
    """A finite number that depends on every floating number of an edit's value; only its gradient matters."""
    leaves = [x for x in jax.tree.leaves(value) if eqx.is_inexact_array(x)]
    small = [
        1e-30 * jnp.where(jnp.isfinite(x), x, 0).astype(jnp.float32) for x in leaves
    ]  # so that no sum overflows
    return sum((x.sum() for x in small), jnp.float32(0.0))


def intervene(fn: Callable[..., Any], edits: Edit | Sequence[Edit]) -> Callable[..., Any]:
    """`fn` with activations changed.

    Args:
        fn: Any JAX function or module with sites.
        edits: What to change; edits at one site apply in order.

    Returns:
        A callable like `fn`; with no edits, `fn` itself.

    Raises:
        SiteError: when called, for a site, layer, axis or index that is not there.
        ShapeError: when called, for a value that does not fit.
    """
    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    wrong = [e for e in edits if not isinstance(e, Edit)]
    if wrong:
        raise ArgumentError(
            f"intervene takes edits such as mechjax.zero('z', layer=0); got {type(wrong[0]).__name__}."
        )
    if isinstance(fn, Transformed):  # one program for both, so that a miss reaches the captures too
        return Transformed(fn.fn, (*fn.edits, *edits), fn.reads)
    return Transformed(hold(fn), edits) if edits else fn


def capture(
    fn: Callable[..., Any],
    sites: str | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    reduce: Callable[..., Array] | None = None,
    **index: Any,
) -> Callable[..., Any]:
    """`fn` that also returns activations.

    Args:
        fn: Any JAX function or module with sites.
        sites: Names of the sites: ours, TransformerLens', or those of a loaded checkpoint's modules.
        layers: The layers to keep, of every stacked site; None for all. Only these are stored.
        reduce: `reduce(x, info)` applied inside the program; only its result is stored.
        **index: The part of an axis to keep, such as `pos=-1` or `head=[1, 4]`; a single index drops the axis.

    Returns:
        A callable that returns `(output, activations)`, where `activations[name]` is `[layer, *batch, *axes]`.

    Raises:
        SiteError: when called, for a site, layer, axis or index that is not there.
    """
    reads = reads_of(sites, layers, reduce, **index)
    if isinstance(fn, Transformed) and not fn.reads:
        return Transformed(fn.fn, fn.edits, reads)
    return Transformed(hold(fn), (), reads)


def reads_of(
    sites: str | Sequence[str],
    layers: int | Sequence[int] | None = None,
    reduce: Callable[..., Array] | None = None,
    **index: Any,
) -> tuple[Read, ...]:
    """The captures that the arguments of `capture` ask for."""
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    if not names:
        raise ArgumentError(
            "capture was given no sites. Name some; mechjax.list_sites(fn, ...) shows what there is."
        )
    chosen = (
        None if layers is None else (layers,) if isinstance(layers, int) else tuple(int(i) for i in layers)
    )
    kept = {axis: as_index(i, f"capture, {axis}") for axis, i in index.items() if i is not None}
    wanted: dict[str, tuple[int, ...] | None] = {}
    for given in names:
        name, layer = spelled_out(given)
        if layer is not None and chosen is not None:
            raise SiteError(
                f"`{given}` already says layer {layer}, but layers={layers} was given too. Give one of them."
            )
        if layer is None and name in wanted:
            raise SiteError(f"captured twice: `{name}`. Name each site once.")
        wanted[name] = chosen if layer is None else (*(wanted.get(name) or ()), layer)
    reducer = None if reduce is None else hold(reduce)
    listed = tuple(axis for axis in kept if isinstance(index[axis], (list, tuple)))
    return tuple(Read(n, at, kept, reducer, listed) for n, at in wanted.items())


def run(
    fn: Callable[..., Any],
    *args: Any,
    edits: Edit | Sequence[Edit] = (),
    capture: str | Sequence[str] = (),
    layers: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Any:
    """Call `fn` with edits and captures: the everyday form of `capture(intervene(fn, edits), sites)(*args)`.

    Args:
        fn: Any JAX function or module with sites.
        *args: Its arguments.
        edits: What to change.
        capture: Sites to return.
        layers: The layers to keep of what is captured.
        **kwargs: Its keyword arguments.

    Returns:
        The output; with `capture`, `(output, activations)`.
    """
    edited = intervene(fn, edits)
    if not capture:
        return (edited if isinstance(edited, Transformed) else Transformed(hold(edited)))(*args, **kwargs)
    return _capture(edited, capture, layers=layers)(*args, **kwargs)


_capture = capture


class SiteList(Mapping[str, SiteInfo]):
    """The sites of a function: name -> axes, shape, layers, dtype. Prints as a table."""

    def __init__(self, table: dict[str, SiteInfo]) -> None:
        self._table = table

    def __getitem__(self, name: str) -> SiteInfo:
        known = self._known(name)
        if known not in self._table:
            raise SiteError(
                f"no site `{name}` here; there are {', '.join(self._table)}.{did_you_mean(known, self._table)}"
            )
        return self._table[known]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._known(name) in self._table

    def _known(self, name: str) -> str:
        return known_as(spelled_out(name)[0], self._table)

    def __iter__(self) -> Any:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return table_text(self._table)


@on_any_mesh
def list_sites(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> SiteList:
    """Every site that `fn(*args, **kwargs)` has or could form on request, in forward order. Zero FLOPs.

    Args:
        fn: Any JAX function or module with sites.
        *args: Arrays, or `jax.ShapeDtypeStruct`s.
        **kwargs: The same.
    """
    return SiteList(trace(hold(fn), args, kwargs, EVERYTHING)[0].sites)
