"""Attention as three equations that each device lowers as it can: mixtures of values, their tangents, their pullback.

Which device a program is for is known when it is lowered (it may be one that is not here), so that is when a kernel is
taken. The equations carry the program without kernels, which is what other devices run, what derivatives of derivatives
go through, and what `transform/cost` counts. To the transform they are equations without sites.

They are equations of their own, not branches of `lax.platform_dependent`. That traces every branch, cuDNN's too where
there is none; forward-mode derivatives would stop at the kernels' own rules where there are kernels; and reverse mode
would keep room for what each branch keeps.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from mechjax.models.config import Config
from mechjax.models.kernels.choice import KERNELS
from mechjax.models.kernels.lowering import lowering
from mechjax.models.kernels.parts import CORE, PLACES, Part, mix, plainly, pullback, split, tangent

_PARTS: dict[Any, Part] = {}


def mixture(
    q: Array, k: Array, v: Array, places: dict[str, Array], config: Config, kernels: tuple[str, ...]
) -> Array:
    """Each head's mixture of values, by one of `kernels` on a platform that has it."""
    return _bind(mix_p, q, k, v, *places.values(), config=config, has=tuple(places), kernels=kernels)[0]


def _bind(primitive: Any, *args: Array, **params: Any) -> list[Array]:
    plain = partial(plainly, _PARTS[primitive], params["config"], params["has"])
    return primitive.bind(*args, program=jax.make_jaxpr(plain)(*args), **params)


def _batch(primitive: Any, args: Any, dims: Any, *, program: Any, **params: Any) -> Any:
    """A mapped axis is one more batch axis; a mapped window, as no kernel has it, goes through plain XLA."""
    values, places = split(params["has"], args)
    of_values, of_places = split(params["has"], dims)
    if of_places.get("window") is not None:
        return jax.vmap(jex.jaxpr_as_fun(program), dims)(*args), [0] * len(program.out_avals)
    size = next(x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None)
    n_batch = values[0].ndim - CORE - (of_values[0] is not None)

    def front(x: Array, dim: int | None, core: int) -> Array:
        if dim is None:
            return jnp.broadcast_to(x, (size, *x.shape)) if core == CORE else x
        x = jnp.moveaxis(x, dim, 0)
        return x.reshape(size, *(1,) * (n_batch + 1 + core - x.ndim), *x.shape[1:])

    whole = [front(x, dim, CORE) for x, dim in zip(values, of_values, strict=True)]
    placed = [front(x, of_places[name], PLACES[name]) for name, x in places.items()]
    outs = _bind(primitive, *whole[:3], *placed, *whole[3:], **params)
    return outs, [0] * len(outs)


def _jvp(primals: Any, tangents: Any, *, program: Any, **params: Any) -> Any:
    moved = [ad.instantiate_zeros(t) for t in tangents[:3]]
    outs = mix_p.bind(*primals, program=program, **params)
    return outs, _bind(tangent_p, *primals, *moved, **params)


def _second_jvp(primitive: Any, primals: Any, tangents: Any, *, program: Any, **params: Any) -> Any:
    """Second derivatives: those of the program without kernels."""
    values, places = split(params["has"], primals)
    moved = [ad.instantiate_zeros(t) for t in split(params["has"], tangents)[0]]

    def of_values(*values: Array) -> list[Array]:
        return jex.jaxpr_as_fun(program)(*values[:3], *places.values(), *values[3:])

    outs = primitive.bind(*primals, program=program, **params)
    return outs, jax.jvp(of_values, tuple(values), tuple(moved))[1]


def _transposed_tangent(cotangents: Any, *args: Any, program: Any, **params: Any) -> Any:
    n = len(args) - 3
    found = _bind(pullback_p, *args[:n], ad.instantiate_zeros(cotangents[0]), **params)
    linear = [ct if ad.is_undefined_primal(x) else None for ct, x in zip(found, args[n:], strict=True)]
    return [None] * n + linear


def _transposed_pullback(cotangents: Any, *args: Any, program: Any, **params: Any) -> Any:
    n = len(args) - 1
    moved = [ad.instantiate_zeros(ct) for ct in cotangents]
    return [None] * n + _bind(tangent_p, *args[:n], *moved, **params)


def _primitive(name: str, part: Part, *, has_kernels: bool) -> Any:
    primitive = jex.Primitive(f"mechjax_{name}")
    primitive.multiple_results = True
    primitive.def_impl(lambda *xs, program, **_: jex.jaxpr_as_fun(program)(*xs))
    primitive.def_abstract_eval(lambda *_, program, **__: program.out_avals)
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    _PARTS[primitive] = part
    mlir.register_lowering(primitive, lowering(part, None))
    for kernel, of in KERNELS.items():
        if has_kernels:
            mlir.register_lowering(primitive, lowering(part, kernel), platform=of.platform)
    return primitive


mix_p = _primitive("mix", mix, has_kernels=True)
tangent_p = _primitive("mix_tangent", tangent, has_kernels=False)
pullback_p = _primitive("mix_pullback", pullback, has_kernels=True)
ad.primitive_jvps[mix_p] = _jvp
ad.primitive_jvps[tangent_p] = partial(_second_jvp, tangent_p)
ad.primitive_jvps[pullback_p] = partial(_second_jvp, pullback_p)
ad.primitive_transposes[tangent_p] = _transposed_tangent
ad.primitive_transposes[pullback_p] = _transposed_pullback
