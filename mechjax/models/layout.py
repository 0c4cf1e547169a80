"""Which axis of each parameter is split over the `model` axis of a mesh, read from the names in its annotation.

Heads, neurons, experts and the vocabulary are split, as Megatron does (Shoeybi et al. 2019, arXiv:1909.08053); what
does not divide, and what has no named axes, is whole on every chip.
"""

import dataclasses
from typing import Any, get_args

import jax

from mechjax.base.axes import names_from_annotation

_SPLIT = ("expert", "kv_head", "head", "d_mlp", "d_vocab")  # the first that a parameter has, and that divides


def layout(model: Any, n_model: int) -> Any:
    """For every array of `model` a tuple with `"model"` at the dimension that is split, None elsewhere.

    Args:
        model: A module whose fields have jaxtyping annotations; its arrays may be `jax.ShapeDtypeStruct`s.
        n_model: How many devices the axis `model` has.
    """

    def of(path: Any, leaf: Any) -> tuple[str | None, ...]:
        names = _axes(model, path, leaf) or (None,) * len(leaf.shape)
        sizes = dict(zip(names, leaf.shape, strict=True))
        split = next((axis for axis in _SPLIT if axis in sizes and sizes[axis] % n_model == 0), None)
        return tuple("model" if split is not None and axis == split else None for axis in names)

    return jax.tree_util.tree_map_with_path(of, model)


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
