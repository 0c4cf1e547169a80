"""How a platform lowers a part of attention: by its kernel, or as the program that the equation carries.

On a mesh whose axes are the compiler's, a kernel runs under a `shard_map` over `data` (the last batch axis that it
divides) and `model` (heads), which is how mechjax lays arrays out. Where heads do not divide, or the mesh has other
axes, there is no kernel, nor where JAX finds no cuDNN.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax.extend import core as jex
from jax.interpreters import mlir
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array

from mechjax.models.config import Config
from mechjax.models.kernels import cudnn, splash
from mechjax.models.kernels.parts import CORE, PLACES, Part, split, without_kernels
from mechjax.models.kernels.windows import Mixed, cases, switch

MIXED: dict[str, Mixed] = {"splash": splash.mixed, "cudnn": cudnn.mixed}
_MAY_BE_ABSENT = frozenset({"cudnn"})
_ONE_RUN = frozenset({"cudnn"})  # kernels that ask it of real tokens in layers without windows too
_ALONE = AbstractMesh(
    (1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2
)  # cuDNN's lowering asks for a mesh


def lowering(part: Part, kernel: str | None) -> Callable[..., Any]:
    """The rule of a platform that has `kernel`; None for those that have none."""

    def rule(
        ctx: Any, *xs: Any, program: Any, config: Config, has: tuple[str, ...], kernels: tuple[str, ...]
    ) -> Any:
        run = jex.jaxpr_as_fun(program)
        if kernel in kernels:
            by_kernel = partial(_by_kernel, part, kernel, config, has)
            spread = _spread(ctx.module_context.axis_context, by_kernel, config, has, ctx.avals_in)
            if spread is not None and (kernel not in _MAY_BE_ABSENT or _is_here(spread, ctx.avals_in)):
                run = spread
        return mlir.lower_fun(run, multiple_results=True)(ctx, *xs)

    return rule


def _by_kernel(
    part: Part, kernel: str, config: Config, has: tuple[str, ...], *operands: Array
) -> list[Array]:
    """A part by a kernel, of whatever heads are here."""
    values, places = split(has, operands)
    q, k = values[:2]
    config = dataclasses.replace(config, n_heads=q.shape[-2], n_kv_heads=k.shape[-2])
    index, found = cases(
        config, MIXED[kernel], partial(without_kernels, config, places), q.shape[-3],
        real=places.get("real"), window=places.get("window"), one_run=kernel in _ONE_RUN,
    )  # fmt: skip
    return switch(index, [partial(part, mixer) for mixer in found], *values)


def _is_here(run: Callable[..., Any], avals: Sequence[Any]) -> bool:
    """Whether JAX finds the kernel: it asks cuDNN for its version, and a GPU that is here for its generation."""
    try:
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    # JAX raises the second for what this version of cuDNN, or this GPU, does not do.
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _spread(
    context: Any, run: Callable[..., Any], config: Config, has: tuple[str, ...], avals: Sequence[Any]
) -> Callable[..., Any] | None:
    """`run` on every device of the mesh that a program is lowered for; None where that cannot be."""
    if not isinstance(context, mlir.ShardingContext):
        return None
    meshes = (aval.sharding.mesh for aval in avals)
    mesh = next((mesh for mesh in meshes if not mesh.empty), _ALONE)
    sizes = dict(mesh.shape)
    n_data, n_model = sizes.get("data", 1), sizes.get("model", 1)
    if n_data * n_model != context.num_devices or config.n_kv_heads % n_model:
        return None
    batch = avals[0].shape[:-CORE]
    which = next((i for i in range(-1, -1 - len(batch), -1) if batch[i] % n_data == 0), None)

    def spec(shape: tuple[int, ...], core: int) -> PartitionSpec:
        own = len(shape) - core
        axes: list[str | None] = [None] * len(shape)
        if which is not None and own >= -which and shape[own + which] > 1 and "data" in sizes:
            axes[own + which] = "data"
        if core == CORE and "model" in sizes:
            axes[-2] = "model"
        return PartitionSpec(*axes)

    cores = [CORE] * len(avals)
    cores[3 : 3 + len(has)] = [PLACES[name] for name in has]
    ins = tuple(spec(aval.shape, core) for aval, core in zip(avals, cores, strict=True))
    return jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=spec(avals[0].shape, CORE), check_vma=False)
