"""Meshes with Explicit axes, which users may bring. The package computes on the same devices with Auto axes.

With Explicit axes every operation must say where its result lies, and a model would be written for one way to split it;
with Auto axes the compiler places what lies between (https://docs.jax.dev/en/latest/notebooks/explicit-sharding.html).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar, cast

import equinox as eqx
import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

_P = ParamSpec("_P")
_R = TypeVar("_R")


def automatic(mesh: Mesh) -> Mesh:
    """The same devices with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def on_any_mesh(fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """`fn`, which also takes arrays on a mesh with Explicit axes, and may be called in the context of one.

    What it returns then lies on that mesh too, split as it came out; from inside a user's `jit` it comes whole, as
    JAX wants to be told there how results of unknown shape are split. A mesh of Auto axes with `fsdp` is set in
    context, for models to keep examples together (`parallel/examples`). Cost: a look at each argument; no array moves.
    """

    @wraps(fn)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        given = (args, kwargs)
        mesh = _explicit(given)
        if mesh is None:
            shared = _with_fsdp(given)
            with nullcontext() if shared is None else jax.set_mesh(shared):
                return fn(*args, **kwargs)
        if any(isinstance(x, Tracer) for x in _leaves(given)):
            return cast(_R, _traced(fn, given, mesh))
        own = automatic(mesh)
        moved: Any = jax.tree.map(partial(_on, mesh=own), given, is_leaf=_is_stream)
        with jax.set_mesh(own):
            found = cast(Any, fn)(*moved[0], **moved[1])
        return jax.tree.map(partial(_on, mesh=mesh), found)

    return wrapped


def _is_stream(x: Any) -> bool:
    return isinstance(x, Iterator)


def _leaves(given: Any) -> list[Any]:
    """All that is given, of which streams of batches are taken as they are."""
    return jax.tree.leaves(given, is_leaf=_is_stream)


def _explicit(given: Any) -> Any:
    """The mesh with Explicit axes that arguments lie on, or in whose context this runs; None where there is none."""
    for x in _leaves(given):
        if isinstance(x, jax.Array):
            where = cast(Any, x.aval if isinstance(x, Tracer) else x).sharding
            if isinstance(where, NamedSharding) and AxisType.Explicit in where.mesh.axis_types:
                return where.mesh
    context = jax.sharding.get_abstract_mesh()
    if context.empty or AxisType.Explicit not in context.axis_types:
        return None
    return context if any(isinstance(x, Tracer) for x in _leaves(given)) else jax.sharding.get_mesh()


def _with_fsdp(given: Any) -> Mesh | None:
    """The mesh that arguments lie on, where it shares weights and examples and none is in context."""
    if not jax.sharding.get_abstract_mesh().empty:
        return None
    for x in _leaves(given):
        if isinstance(x, jax.Array) and not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
            return cast(Mesh, x.sharding.mesh) if x.sharding.mesh.shape.get("fsdp", 1) > 1 else None
    return None


def _on(x: Any, mesh: Mesh) -> Any:
    """An array on the same devices of another mesh; anything else as it is."""
    if not isinstance(x, jax.Array) or not isinstance(x.sharding, NamedSharding):
        return x
    if x.sharding.mesh.axis_names != mesh.axis_names:
        return x
    return jax.device_put(x, NamedSharding(mesh, x.sharding.spec))


def _traced(fn: Callable[..., Any], given: Any, mesh: AbstractMesh) -> Any:
    arrays, static = eqx.partition(given, eqx.is_array, is_leaf=_is_stream)
    kept: list[Any] = []

    def run(arrays: Any) -> Any:
        args, kwargs = eqx.combine(arrays, static, is_leaf=_is_stream)
        found, rest = eqx.partition(fn(*args, **kwargs), eqx.is_array)
        kept.append(rest)
        return found

    with jax.sharding.use_abstract_mesh(mesh):
        found = jax.sharding.auto_axes(run, axes=mesh.axis_names, out_sharding=PartitionSpec())(arrays)
    return eqx.combine(found, kept[-1])
