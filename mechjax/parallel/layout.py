"""Which axis of each parameter is split over the `model` axis of a mesh, read from the names in its annotation.

What does not divide, and what has no named axes, is whole on every chip.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

import jax

from mechjax.base.axes import names_from_annotation


def layout(module: Any, n_model: int, axes: Sequence[str]) -> Any:
    """For every array of `module` a tuple with `"model"` at the dimension that is split, None elsewhere.

    Args:
        module: A module whose fields have jaxtyping annotations; its arrays may be `jax.ShapeDtypeStruct`s.
        n_model: How many devices the axis `model` has.
        axes: Names of axes that may be split: of each parameter the first that it has and that divides.
    """

    def of(path: Any, leaf: Any) -> tuple[str | None, ...]:
        names = _axes(module, path, leaf) or (None,) * len(leaf.shape)
        sizes = dict(zip(names, leaf.shape, strict=True))
        split = next((axis for axis in axes if axis in sizes and sizes[axis] % n_model == 0), None)
        return tuple("model" if split is not None and axis == split else None for axis in names)

    return jax.tree_util.tree_map_with_path(of, module)


def _axes(owner: Any, path: Any, leaf: Any) -> tuple[str, ...] | None:
    """Names of the axes of the leaf at `path`; None where its annotation does not tell."""
    annotation: Any = None
    for key in path:
        name = getattr(key, "name", None)
        if name is None or not dataclasses.is_dataclass(owner):
            return None
        annotation = next((f.type for f in dataclasses.fields(owner) if f.name == name), None)
        owner = getattr(owner, name)
    choices = [a for a in (annotation, *get_args(annotation)) if hasattr(a, "dim_str")]
    return names_from_annotation(choices[0].dim_str, len(leaf.shape), {}) if choices else None
