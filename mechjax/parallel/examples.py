"""Activations split over examples, where the mesh in context shares weights and examples over `fsdp`."""

import math

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float


def over_examples(x: Float[Array, "*batch pos d"]) -> Float[Array, "*batch pos d"]:
    """`x` as it is; on a mesh with `fsdp` each device keeps whole rows of its own examples.

    Without this the compiler would split the stream as the weights are split, along `d_model`: every example would then
    lie on every device along `fsdp`, and each of them would attend for all. With it a layer's weights are gathered when
    the layer runs, which is what `fsdp` means (Zhao et al. 2023, arXiv:2304.11277).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get("fsdp", 1) == 1 or x.ndim < 3:
        return x
    axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    if any(kinds[name] != AxisType.Auto for name in axes) or x.shape[-3] % math.prod(
        mesh.shape[a] for a in axes
    ):
        return x
    free = P.UNCONSTRAINED
    return lax.with_sharding_constraint(x, P(*(free,) * (x.ndim - 3), axes, free, None))
