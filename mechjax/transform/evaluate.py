"""Running a program with edits and captures.

Only equations that contain a site that is asked for are touched: sites are edited and read here, equations around
them are emitted again by `rules`. Everything else runs as whole pieces, untouched, so that the rest of JAX stays JAX's
concern.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jaxtyping import Array

from mechjax.transform.changes import change
from mechjax.transform.request import Env, Request, State, write_row
from mechjax.transform.rules import rule_for
from mechjax.transform.site import site_p
from mechjax.transform.table import SiteInfo, axis_names, inner_jaxprs, site_name


def evaluate(
    request: Request, jaxpr: Any, consts: Any, args: Any, env: Env, state: State
) -> tuple[list[Any], State]:
    """Run `jaxpr` on `args`, doing what `request` asks; the state goes in and comes out."""
    values = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(v: Any) -> Any:
        return v.val if isinstance(v, jex.Literal) else values[v]

    for eqn, piece in _pieces(request, jaxpr):
        if eqn is None:
            ins, outs, closed = piece
            values.update(zip(outs, jex.jaxpr_as_fun(closed)(*[values[v] for v in ins]), strict=True))
            continue
        operands = [read(v) for v in eqn.invars]
        if eqn.primitive is site_p:
            results, state = _at_site(request, eqn, operands, env, state)
        else:
            results, state = rule_for(eqn)(evaluate, request, eqn, operands, env, state)
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(v) for v in jaxpr.outvars], state


def _pieces(request: Request, jaxpr: Any) -> list[tuple[Any, Any]]:
    """The program cut at the equations that are touched: (equation, None) or (None, (ins, outs, program))."""
    if id(jaxpr) in request.runs:
        return request.runs[id(jaxpr)]
    eqns = list(jaxpr.eqns)
    touched = [request.wants(e) or any(request.touches(j) for j in inner_jaxprs(e)) for e in eqns]
    live = {v for v in jaxpr.outvars if not isinstance(v, jex.Literal)}
    pieces: list[tuple[Any, Any]] = []
    end = len(eqns)
    while end > 0:  # backwards, so that what a piece must hand on is known
        start = end - 1
        while not touched[end - 1] and start > 0 and not touched[start - 1]:
            start -= 1
        run = eqns[start:end]
        defined = [v for e in run for v in e.outvars if type(v).__name__ != "DropVar"]
        used = [v for e in run for v in e.invars if not isinstance(v, jex.Literal)]
        if touched[end - 1]:
            pieces.append((run[0], None))
        else:
            ins = list(dict.fromkeys(v for v in used if v not in set(defined)))
            outs = [v for v in defined if v in live]
            inner = jaxpr.replace(
                constvars=[], invars=ins, outvars=outs, eqns=run,
                effects=frozenset().union(*[e.effects for e in run]),
                debug_info=jaxpr.debug_info._replace(arg_names=None, result_paths=None),
            )  # fmt: skip
            pieces.append((None, (ins, outs, jex.ClosedJaxpr(inner, ()))))
        live = (live - set(defined)) | set(used)
        end = start
    pieces.reverse()
    request.keep(jaxpr)
    request.runs[id(jaxpr)] = pieces
    return pieces


def _at_site(
    request: Request, eqn: Any, operands: list[Any], env: Env, state: State
) -> tuple[list[Any], State]:
    """Edit the activation, hand it on under its name, then read it: a capture sees what leaves the site."""
    x, *given = operands
    name = site_name(eqn) or ""
    info, dims = request.sites[name], eqn.params["bdims"]
    layer = given[0] if given else env.counter
    at = given[1] if info.along is not None else None
    edits, reads = request.asked(env.numbers)
    x, hits = _edited(edits, x, layer, info, dims, _offsets(info, at), state.hits)
    x = site_p.bind(x, *given, **eqn.params)
    buffers, counts = dict(state.buffers), dict(state.counts)
    if request.reads_here(eqn):
        for read in (r for r in reads if r.site == name):
            put = partial(write_row, read, info, at)
            buffers[name], counts[name] = _written(
                read, put, x, layer, info, dims, buffers[name], counts[name]
            )
    return [x], State(buffers, counts, hits)


def _edited(edits: Any, x: Array, layer: Any, info: SiteInfo, dims: Any, offsets: Any,
            hits: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:  # fmt: skip
    updated = list(hits)
    for k, edit in enumerate(edits):
        if edit.site != info.name:
            continue

        def run(x: Array, layer: Any, edit: Any = edit) -> tuple[Array, Array]:
            return change(edit, x, layer, info, offsets)

        for dim, layer_dim in dims:  # innermost map first: the edit sees one example
            run = jax.vmap(run, in_axes=(dim, layer_dim), out_axes=(dim, 0))
        x, hit = run(x, layer)
        updated[k] = hits[k] | hit.reshape(-1, *hits[k].shape).any(0)
    return x, tuple(updated)


def _written(read: Any, put: Any, x: Array, layer: Any, info: SiteInfo, dims: Any, buffer: Array,
             count: Array) -> tuple[Array, Array]:  # fmt: skip
    """The buffer with what is kept of `x` in the row of its layer."""

    def value(x: Array) -> Array:
        return read.value(x, info, layer)

    def write(x: Array, layer: Any, buffer: Array) -> tuple[Array, Array]:
        return put(buffer, jnp.zeros_like(count), read.value(x, info, layer), layer)

    run: Any = value
    if all(layer_dim is None for _, layer_dim in dims):
        for dim, _ in dims:
            run = jax.vmap(run, in_axes=dim, out_axes=0)
        return put(buffer, count, run(x), layer)
    run = write  # the layer itself is mapped over: every example writes its own row
    at = 0 if read.rows(info) is None else 1
    for dim, layer_dim in dims:
        run = jax.vmap(run, in_axes=(dim, layer_dim, at), out_axes=(at, 0))
    buffer, ran = run(x, layer, buffer)
    return buffer, count + ran.reshape(-1, *count.shape).max(0)


def _offsets(info: SiteInfo, at: Any) -> tuple[Any, ...]:
    """Per dimension of one example, the global index of the local part's first element.

    `at` is the index that a loop along one of them is at.
    """
    offsets = list(info.missing) if info.mapped is None or info.spec is None else _of_parts(info)
    if info.along is not None:
        offsets[info.n_batch + info.axes.index(info.along)] = at
    return tuple(offsets)


def _of_parts(info: SiteInfo) -> list[Any]:
    """The same of this device's part inside `shard_map`."""
    mesh: Any = info.mapped and info.mapped.mesh
    offsets: list[Any] = []
    for whole, entry in zip(info.local, info.spec or (), strict=True):
        position = 0
        for axis in axis_names(entry):
            position = position * mesh.shape[axis] + jax.lax.axis_index(axis)
        parts = 1
        for axis in axis_names(entry):
            parts *= mesh.shape[axis]
        offsets.append(position * (whole // parts))
    return offsets
