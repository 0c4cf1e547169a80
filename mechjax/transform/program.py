"""A callable traced into a program whose sites are known.

Tracing goes through `jax.jit`, whose cache knows everything that a trace depends on (shapes, precision, mesh, the
sites asked for); the program rides in the static part of the output. So a second call with other numbers finds the
program again, and arrays that the callable closes over become arguments of the program instead of constants.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import JitError
from mechjax.transform.context import wanting
from mechjax.transform.static import unhold
from mechjax.transform.table import SiteInfo, site_table


class Program:
    """A traced callable: its jaxpr, the arrays it closed over, how to rebuild its output, and its sites.

    `function` tells callables apart, `name` names them for people, and the first `n_own` arrays are their own.
    """

    def __init__(self, closed_jaxpr: Any, rebuild: Callable[[list[Any]], Any], key: "_Key") -> None:
        self.jaxpr = closed_jaxpr.jaxpr
        self.consts = list(closed_jaxpr.consts)
        self.rebuild = rebuild
        self.sites: dict[str, SiteInfo] = site_table(closed_jaxpr)
        self.function, self.name, self.n_own = key.function, key.name, key.n_own


class _Call:
    """The static part of a call, hashable; arrays are its leaves."""

    def __init__(self, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fn_leaves, fn_tree = jax.tree.flatten(fn)
        arg_leaves, arg_tree = jax.tree.flatten((args, kwargs))
        leaves = fn_leaves + arg_leaves
        # Python numbers are data in arguments (a list of token ids), settings in a callable, as equinox has it.
        is_data = [_is_array(x) for x in fn_leaves] + [
            _is_array(x) or eqx.is_array_like(x) for x in arg_leaves
        ]
        self.data = [x for x, d in zip(leaves, is_data, strict=True) if d]
        fixed = tuple(x for x, d in zip(leaves, is_data, strict=True) if not d)
        self.key = _Key(fn_tree, arg_tree, tuple(is_data), fixed, len(fn_leaves))
        self.key.name = getattr(unhold(fn), "__name__", type(fn).__name__)


class _Key:
    """Equality of the static parts of two calls."""

    name = ""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        fn_tree, _, is_data, fixed, n_fn = parts
        self.n_own = sum(is_data[:n_fn])
        self.function = (fn_tree, fixed[: n_fn - self.n_own])
        try:
            self.hash = hash(parts)
        except TypeError as error:
            raise JitError(
                f"a call of a transformed function has a static part that cannot be hashed ({error}). Pass arrays "
                "as arrays, and everything else as hashable values (tuples, strings, functions)."
            ) from None

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.parts == other.parts

    def call(self, data: list[Any]) -> Any:
        fn_tree, arg_tree, is_data, fixed, n_fn = self.parts
        values, others = iter(data), iter(fixed)
        leaves = [next(values) if d else next(others) for d in is_data]
        fn = unhold(jax.tree.unflatten(fn_tree, leaves[:n_fn]))
        args, kwargs = jax.tree.unflatten(arg_tree, leaves[n_fn:])
        return fn(*args, **kwargs)


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


@jax.tree_util.register_pytree_node_class
class _Carrier:
    """Carries a program out of a traced function: no leaves, the program is structure."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def tree_flatten(self) -> tuple[tuple[()], Hashable]:
        return (), self.program

    @classmethod
    def tree_unflatten(cls, program: Program, _: tuple[()]) -> "_Carrier":
        return cls(program)


@functools.lru_cache(maxsize=1024)
def _tracer(key: _Key) -> Callable[[list[Any]], _Carrier]:
    def traced(data: list[Any]) -> _Carrier:
        structure: list[Any] = []

        def flat(data: list[Any]) -> list[Any]:
            leaves, tree = jax.tree.flatten(key.call(data))
            arrays = [eqx.is_array_like(x) for x in leaves]
            structure[:] = [tree, arrays, [x for x, a in zip(leaves, arrays, strict=True) if not a]]
            return [x for x, a in zip(leaves, arrays, strict=True) if a]

        closed = jax.make_jaxpr(flat)(data)
        tree, arrays, fixed = structure

        def rebuild(outs: list[Any]) -> Any:
            values, others = iter(outs), iter(fixed)
            return jax.tree.unflatten(tree, [next(values) if a else next(others) for a in arrays])

        return _Carrier(Program(closed, rebuild, key))

    return jax.jit(traced)


def trace(
    fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any], names: frozenset[str]
) -> tuple[Program, list[Any]]:
    """The program of `fn(*args, **kwargs)` with the sites `names` formed, and the arrays to run it on. Zero FLOPs."""
    call = _Call(fn, args, kwargs)
    with wanting(names):
        carrier = jax.eval_shape(_tracer(call.key), call.data)
    return carrier.program, [
        jnp.asarray(x) if not isinstance(x, jax.ShapeDtypeStruct) else x for x in call.data
    ]
