"""Arrays on a mesh: `shard` splits whatever has named axes, of one process or of many.

Cost: each device gets its part; nothing is gathered. Exact: values never change.
"""

from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mechjax.base.errors import ShapeError
from mechjax.parallel.layout import Spec, layout, split
from mechjax.parallel.mesh import accepted


def shard(value: Any, mesh: Mesh, *, axes: str | None = None) -> Any:
    """`value` with its arrays on a mesh: models by heads, neurons and vocabulary, prompts by examples.

    Args:
        value: A model, prompts, a dictionary or any module whose fields name their axes (jaxtyping annotations); a
            pytree of arrays whose axes are given; or shapes (`jax.ShapeDtypeStruct`) of such, which then say where
            they lie. Where several processes share the mesh, each gives the whole value and keeps its part.
        mesh: As `mj.make_mesh` makes it; also one with Explicit axes, in whose place the same devices with Auto axes
            are used.
        axes: Names of the axes of every array, such as "batch pos", for arrays that are no module's.

    Returns:
        The same, on the mesh. What has no names is whole on every device.

    Raises:
        ArgumentError: A mesh with an axis that means nothing here, or one that does not divide what it should split:
            which, and what would fit.
        ShapeError: `axes` for arrays of another rank.
    """
    mesh = accepted(mesh)
    sizes = dict(mesh.shape)
    arrays, static = eqx.partition(value, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
    if axes is None:
        found = layout(arrays, sizes)
    else:
        names = tuple(axes.split())
        found = jax.tree.map(lambda x: split(_fitting(names, x.shape), x.shape, sizes), arrays)

    def place(x: Any, spec: Spec) -> Any:
        return spread(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return eqx.combine(jax.tree.map(place, arrays, found), static)


def _fitting(names: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, ...]:
    if len(names) != len(shape):
        raise ShapeError(
            f"axes={' '.join(names)!r} names {len(names)} axes; an array has the shape {shape}. Name each axis once."
        )
    return names


def spread(x: Any, sharding: NamedSharding) -> Any:
    """An array on a mesh; where several processes share that, each has the whole array and keeps its part.

    Of a shape (`jax.ShapeDtypeStruct`) the same shape, which then says where it lies.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    if jax.process_count() == 1 or not getattr(x, "is_fully_addressable", True):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
