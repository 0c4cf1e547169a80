"""Which dimension of an array lies over which axis of a mesh: one table, read with the names in annotations.

The table is Megatron's (Shoeybi et al. 2019, arXiv:1909.08053) for `model`: heads, neurons and the vocabulary, so that
a block needs two sums over devices. `fsdp` splits what is left of the weights, and the batch (Zhao et al. 2023,
arXiv:2304.11277). Norms, and whatever has no names, are whole on every device.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args

import jax

from mechjax.base.axes import names_from_annotation
from mechjax.base.errors import ArgumentError

_MODEL = ("expert", "kv_head", "head", "d_mlp", "d_inner", "feature", "d_vocab")
RULES: Mapping[str, tuple[str, ...]] = {
    "expert": ("expert",),
    "model": _MODEL,
    "tensor": _MODEL,
    "data": ("batch",),
    "fsdp": ("batch", "d_model"),
    "sequence": ("pos",),
}
"""An axis of a mesh: the axes of arrays that it may split, of each array the first that it has."""
MAY_BE_WHOLE = frozenset({"kv_head", "d_vocab"})
"""Axes that are whole on every device where they do not divide: few key heads, a vocabulary of odd size."""

Spec = tuple[str | tuple[str, ...] | None, ...]


def layout(module: Any, sizes: Mapping[str, int], rules: Mapping[str, tuple[str, ...]] = RULES) -> Any:
    """For every array of `module` which axes of a mesh split each of its dimensions; None for none.

    Args:
        module: A module whose fields have jaxtyping annotations; its arrays may be `jax.ShapeDtypeStruct`s.
        sizes: The axes of the mesh and how many devices each has.
        rules: What each may split.

    Raises:
        ArgumentError: A dimension that should be split and does not divide.
    """

    def of(path: Any, leaf: Any) -> Spec:
        names, shape = _axes(module, path, leaf)
        if names is None:
            return (None,) * len(leaf.shape)
        found = split(names, shape, sizes, rules)
        return found if shape == leaf.shape else _where_it_divides(found, leaf.shape, sizes)

    return jax.tree_util.tree_map_with_path(of, module)


def split(
    names: tuple[str, ...],
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    rules: Mapping[str, tuple[str, ...]] = RULES,
) -> Spec:
    """Which axes of a mesh split each dimension of an array whose axes have names.

    Raises:
        ArgumentError: A dimension that should be split and does not divide.
    """
    over: list[tuple[str, ...]] = [()] * len(names)
    for axis, may in rules.items():
        size = sizes.get(axis, 1)
        # A dimension is split by one axis, but that the batch may be by two.
        free = [i for i, name in enumerate(names) if name in may and (not over[i] or name == "batch")]
        if size == 1 or not free:
            continue
        i = min(free, key=lambda i: may.index(names[i]))
        there = size
        for other in over[i]:
            there *= sizes[other]
        if shape[i] % there == 0:
            over[i] = (*over[i], axis)
        elif names[i] not in MAY_BE_WHOLE:
            raise ArgumentError(_does_not_divide(names[i], shape[i], (*over[i], axis), sizes))
    return tuple(None if not axes else axes[0] if len(axes) == 1 else axes for axes in over)


def _where_it_divides(whole: Spec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Spec:
    """How a part of a quantised matrix lies, of which axes are shorter: as the matrix, or whole where that is odd."""
    n = [math.prod(sizes[axis] for axis in ((a,) if isinstance(a, str) else a or ())) for a in whole]
    return tuple(None if size % k else axes for size, k, axes in zip(shape, n, whole, strict=True))


def _does_not_divide(name: str, n: int, axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    by = " x ".join(f"{axis}={sizes[axis]}" for axis in axes)
    most = max(sizes[axis] for axis in axes)
    fits = ", ".join(str(size) for size in range(1, min(n, 16 * most) + 1) if n % size == 0)
    return f"`{name}` has {n}, which {by} devices cannot share equally. Of `{name}`, {fits} devices can."


def _axes(owner: Any, path: Any, leaf: Any) -> tuple[tuple[str, ...] | None, tuple[int, ...]]:
    """Names of the axes of the leaf at `path`, None where its annotation does not tell; and the shape that has them.

    That is the leaf's own, or that of the array which a module with a shape (a quantised matrix) stands for.
    """
    annotation: Any = None
    for key in path:
        if isinstance(owner, (tuple, list, dict)):  # what is inside is told by itself
            inside: Any = owner
            annotation, owner = None, inside[getattr(key, "idx", getattr(key, "key", None))]
            continue
        name = getattr(key, "name", None)
        if name is None or not dataclasses.is_dataclass(owner):
            return None, leaf.shape
        annotation = next((f.type for f in dataclasses.fields(owner) if f.name == name), None)
        owner = getattr(owner, name)
        if dataclasses.is_dataclass(owner) and isinstance(getattr(owner, "shape", None), tuple):
            break
    shape = getattr(owner, "shape", leaf.shape)
    choices = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "dim_str")]
    return (names_from_annotation(choices[0].dim_str, len(shape), {}) if choices else None), shape
