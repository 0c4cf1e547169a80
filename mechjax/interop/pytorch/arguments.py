"""What a bridged module is called with, against the example that it was exported for."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError, ShapeError, did_you_mean
from mechjax.base.optional import require
from mechjax.interop.pytorch.arrays import array_dtype, in_range, to_tensor


@dataclass(frozen=True)
class Constant:
    """An argument that is no array: it is part of the exported program."""

    value: Any


@dataclass(frozen=True, eq=False)
class Arguments:
    """The example's arguments, by name.

    Attributes:
        positional: The names that the example gave without names, in order.
        names: All names, in the order of the module's `forward`.
        example: Name -> its value, with torch tensors for arrays and `Constant` for what else is no tree.
    """

    positional: tuple[str, ...]
    names: tuple[str, ...]
    example: dict[str, Any]

    @property
    def leaves(self) -> list[tuple[str, Any]]:
        """Every tensor of the example, with its place in words."""
        flat, _ = jax.tree_util.tree_flatten_with_path(self.example)
        return [(_place(at), x) for at, x in flat if not isinstance(x, Constant)]

    def call(self, tensors: Any, *, fixed: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `forward`, with these tensors in the example's places."""
        flat, tree = jax.tree.flatten(self.example)
        left = iter(tensors)
        values = jax.tree.unflatten(tree, [x.value if isinstance(x, Constant) else next(left) for x in flat])
        args = tuple(values.pop(name) for name in self.positional)
        return args, fixed | values

    def arrays(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[jax.Array]:
        """The arrays of a call, in the order of the example's, each of the example's dtype.

        Raises:
            ArgumentError: An argument is missing, unknown, given twice or not built as in the example.
            ShapeError: An array of another kind or number of axes than the example's.
        """
        given = self._named(args, kwargs)
        for name, value in self.example.items():
            if name not in given and all(isinstance(x, Constant) for x in jax.tree.leaves(value)):
                given[name] = jax.tree.map(lambda x: x.value, value)
        missing = [name for name in self.names if name not in given]
        if missing:
            raise ArgumentError(
                f"the call lacks {_listed(missing)}, which the example had. It takes {_listed(self.names)}."
            )
        if (found := jax.tree.structure(given)) != (tree := jax.tree.structure(self.example)):
            raise ArgumentError(
                f"the call's arguments are built as {found}, the example's as {tree}: give what from_torch was given."
            )
        flat, _ = jax.tree_util.tree_flatten_with_path(self.example)
        arrays = []
        for (at, example), value in zip(flat, jax.tree.leaves(given), strict=True):
            if not isinstance(example, Constant):
                arrays.append(_array(value, example, _place(at)))
            elif not _same(value, example.value):
                raise ArgumentError(
                    f"`{_place(at)}` was {example.value!r} in the example, and as it is no array it is part of the "
                    f"exported program; the call gives {value!r}. Make another subject with that value."
                )
        return arrays

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.names):
            raise ArgumentError(f"the call has {len(args)} arguments; it takes {_listed(self.names)}.")
        given = dict(zip(self.names, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise ArgumentError(f"`{name}` is given twice, by place and by name.")
            if name not in self.names:
                raise ArgumentError(
                    f"`{name}` was not in the example of from_torch, so the exported program does not take it."
                    f"{did_you_mean(name, self.names)} It takes {_listed(self.names)}; put it into the example."
                )
            given[name] = value
        return given


def arguments(module: Any, example: Any) -> Arguments:
    """The example, taken apart.

    Raises:
        ArgumentError: It is no tensor, tuple or dictionary of named arguments, or holds no tensor at all.
    """
    torch = require("torch", extra="torch")
    forward = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(example, Mapping):
        given = {str(name): value for name, value in example.items()}
        positional: tuple[str, ...] = ()
    else:
        values = example if isinstance(example, (tuple, list)) else (example,)
        names = [*forward, *(f"argument {i}" for i in range(len(forward), len(values)))]
        positional = tuple(names[: len(values)])
        given = dict(zip(positional, values, strict=True))

    def leaf(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x
        if isinstance(x, (jax.Array, np.ndarray, np.generic)):
            return to_tensor(x)
        if isinstance(x, (bool, int, float, complex, str)):
            return Constant(x)
        raise ArgumentError(
            f"the example holds a {type(x).__name__}; from_torch takes a tensor, a tuple of arguments or a dictionary "
            "of named arguments, with tensors, arrays, numbers, strings, tuples, lists and dictionaries in them."
        )

    found = {name: jax.tree.map(leaf, value) for name, value in given.items()}
    order = {name: i for i, name in enumerate([*positional, *forward])}
    names = tuple(sorted(found, key=lambda name: order.get(name, len(order))))
    if not any(isinstance(x, torch.Tensor) for x in jax.tree.leaves(found)):
        raise ArgumentError(
            "the example of from_torch holds no tensor or array. Give what the module is called with, for a language "
            "model {'input_ids': ids}."
        )
    return Arguments(positional, names, found)


def _array(value: Any, example: Any, place: str) -> jax.Array:
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, bool, int, float)):
        raise ArgumentError(
            f"`{place}` is a {type(value).__name__}; a subject takes NumPy or JAX arrays: `tensor.numpy()`."
        )
    dtype = array_dtype(example.dtype, of=f"`{place}`")
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu" and dtype.kind in "iu":
        array = in_range(value, dtype, of=f"`{place}`")
    else:
        array = jnp.asarray(value)
    if array.dtype != dtype and not (array.dtype.kind in "iu" and dtype.kind in "iu"):
        raise ShapeError(
            f"`{place}` is {array.dtype.name}, but was {dtype.name} in the example of from_torch. Convert it: "
            f"x.astype('{dtype.name}')."
        )
    if array.ndim != example.dim():
        raise ShapeError(
            f"`{place}` has {array.ndim} axes, shape {array.shape}; in the example it had {example.dim()}, "
            f"shape {tuple(example.shape)}."
        )
    return array.astype(dtype)


def _same(given: Any, example: Any) -> bool:
    return type(given) is type(example) and given == example


def _place(at: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(at, simple=True, separator=".")


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
