"""Attention as three equations that each device lowers as it can: mixtures of values, their tangents, their pullback.

Which device a program is for is known when it is lowered (it may be one that is not here), so that is when a kernel is
taken. The equations carry the program without kernels, `fused`, which is what other devices run, what derivatives of
derivatives go through, and what `transform/cost` counts. To the transform they are equations without sites.

They are equations of their own, not branches of `lax.platform_dependent`, because that traces every branch: forward-mode
derivatives would stop at the kernels' own rules on every device, and reverse mode would keep what each branch keeps.

On a mesh whose axes are the compiler's, a kernel runs under a `shard_map` over `data` (the last batch axis that it
divides) and `model` (heads), which is how mechjax lays arrays out. Where heads do not divide, or the mesh has other axes,
there is no kernel.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Float

from mechjax.models.config import Config
from mechjax.models.fused import Sides, fused
from mechjax.models.kernels import cudnn, splash
from mechjax.models.kernels.choice import KERNELS, Asked, kernels_for, placed_by_hand
from mechjax.models.kernels.windows import Mixed, cases, switch
from mechjax.models.positions import Places

MIXED: dict[str, Mixed] = {"splash": splash.mixed, "cudnn": cudnn.mixed}
_MAY_BE_ABSENT = frozenset({"cudnn"})
_ONE_RUN = frozenset({"cudnn"})  # kernels that ask it of real tokens in layers without windows too
_ALONE = AbstractMesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)  # as cuDNN's lowering asks for one
_RANKS = {"real": 1, "order": 1, "window": 0}


def attend(
    q: Float[Array, "*batch query head d_head"],
    k: Float[Array, "*batch key kv_head d_head"],
    v: Float[Array, "*batch key kv_head d_value"],
    sides: Sides,
    sinks: Float[Array, " head"] | None,
    config: Config,
    *,
    causal: bool,
) -> Float[Array, "*batch query head d_value"]:
    """Each head's mixture of values, by a device's kernel where one takes it.

    Exact to the rounding of the kernel. Where a kernel may be taken, derivatives run attention's forward pass again, on
    every device; second ones go through no kernel.

    Args:
        q: Queries.
        k: Keys.
        v: Values.
        sides: Where queries and keys stand, and the layer's window.
        sinks: Scores of keys that are not there.
        config: The model's.
        causal: Whether the keys are the queries' own tokens, each of which sees those up to it.
    """
    by_hand = any(placed_by_hand(x) for x in (q, k, v))
    asked = Asked(
        config, q.dtype, q.shape[-3], q.shape[-1], v.shape[-1], causal, sinks is not None, by_hand
    )
    kernels = kernels_for(asked)
    if not kernels:
        return fused(q, k, v, sides, sinks, config)
    places, _, window = sides
    given = {"real": places.real, "order": places.order, "window": window}
    has = tuple(name for name, x in given.items() if x is not None)
    rest = [x for x in given.values() if x is not None]
    return _bind(_mix_p, q, k, v, *rest, config=config, has=has, kernels=kernels)[0]


def _without_kernels(config: Config, has: tuple[str, ...], q: Array, k: Array, v: Array, *rest: Array) -> Array:
    """The mixture in plain XLA."""
    given = dict(zip(has, rest, strict=True))
    places = Places(jnp.arange(q.shape[-3], dtype=jnp.int32), given.get("real"), given.get("order"))
    return fused(q, k, v, (places, places, given.get("window")), None, config)


def _mix(mixer: Callable[..., Array], q: Array, k: Array, v: Array, *, rest: Sequence[Array]) -> list[Array]:
    return [mixer(q, k, v, *rest)]


def _tangent(mixer: Callable[..., Array], *args: Array, rest: Sequence[Array]) -> list[Array]:
    return [jax.jvp(lambda q, k, v: mixer(q, k, v, *rest), args[:3], args[3:])[1]]


def _pullback(mixer: Callable[..., Array], q: Array, k: Array, v: Array, dz: Array, *, rest: Sequence[Array]) -> list[Array]:
    return list(jax.vjp(lambda q, k, v: mixer(q, k, v, *rest), q, k, v)[1](dz))


def _split(has: tuple[str, ...], args: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """What the mixture is a function of and what is linear; and what says where the tokens stand."""
    return (*args[:3], *args[3 + len(has) :]), args[3 : 3 + len(has)]


def _plainly(part: Callable[..., list[Array]], config: Config, has: tuple[str, ...], *args: Array) -> list[Array]:
    """A part of the three in plain XLA."""
    values, rest = _split(has, args)
    return part(partial(_without_kernels, config, has), *values, rest=rest)


def _by_kernel(
    part: Callable[..., list[Array]], kernel: str, config: Config, has: tuple[str, ...], *args: Array
) -> list[Array]:
    """A part of the three by a kernel, of whatever heads are here."""
    values, rest = _split(has, args)
    q, k = values[:2]
    config = dataclasses.replace(config, n_heads=q.shape[-2], n_kv_heads=k.shape[-2])
    given = dict(zip(has, rest, strict=True))
    index, found = cases(
        config, MIXED[kernel], lambda q, k, v: _without_kernels(config, has, q, k, v, *rest), q.shape[-3],
        real=given.get("real"), window=given.get("window"), one_run=kernel in _ONE_RUN,
    )  # fmt: skip
    return switch(index, [partial(part, mixer, rest=()) for mixer in found], *values)


def _bind(primitive: Any, *args: Array, **params: Any) -> list[Array]:
    plainly = partial(_plainly, _PARTS[primitive], params["config"], params["has"])
    return primitive.bind(*args, program=jax.make_jaxpr(plainly)(*args), **params)


def _batch(primitive: Any, args: Any, dims: Any, *, program: Any, **params: Any) -> Any:
    """A mapped axis is one more batch axis; a mapped window, as no kernel has it, goes through plain XLA."""
    values, rest = _split(params["has"], args)
    of_values, of_rest = _split(params["has"], dims)
    named = dict(zip(params["has"], of_rest, strict=True))
    if named.get("window") is not None:
        return jax.vmap(jex.jaxpr_as_fun(program), dims)(*args), [0] * len(program.out_avals)
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    n_batch = values[0].ndim - 3 - (of_values[0] is not None)

    def front(x: Array, dim: int | None, rank: int) -> Array:
        if dim is None:
            return jnp.broadcast_to(x, (size, *x.shape)) if rank == 3 else x
        x = jnp.moveaxis(x, dim, 0)
        return x.reshape(size, *(1,) * (n_batch + 1 + rank - x.ndim), *x.shape[1:])

    whole = [front(x, dim, 3) for x, dim in zip(values, of_values, strict=True)]
    placed = [front(x, named[name], _RANKS[name]) for name, x in zip(params["has"], rest, strict=True)]
    outs = _bind(primitive, *whole[:3], *placed, *whole[3:], **params)
    return outs, [0] * len(outs)


def _jvp_of_mix(primals: Any, tangents: Any, *, program: Any, **params: Any) -> Any:
    moved = [ad.instantiate_zeros(t) for t in tangents[:3]]
    return _bind(_mix_p, *primals, **params), _bind(_tangent_p, *primals, *moved, **params)


def _jvp_of_derivative(primitive: Any, primals: Any, tangents: Any, *, program: Any, **params: Any) -> Any:
    """Second derivatives: those of the program without kernels."""
    values, rest = _split(params["has"], primals)
    moved = [ad.instantiate_zeros(t) for t in _split(params["has"], tangents)[0]]

    def of_values(*values: Array) -> list[Array]:
        return jex.jaxpr_as_fun(program)(*values[:3], *rest, *values[3:])

    outs = primitive.bind(*primals, program=program, **params)
    return outs, jax.jvp(of_values, tuple(values), tuple(moved))[1]


def _transpose_of_tangent(cotangents: Any, *args: Any, program: Any, **params: Any) -> Any:
    n = len(args) - 3
    found = _bind(_pullback_p, *args[:n], ad.instantiate_zeros(cotangents[0]), **params)
    linear = [ct if ad.is_undefined_primal(x) else None for ct, x in zip(found, args[n:], strict=True)]
    return [None] * n + linear


def _transpose_of_pullback(cotangents: Any, *args: Any, program: Any, **params: Any) -> Any:
    n = len(args) - 1
    moved = [ad.instantiate_zeros(ct) for ct in cotangents]
    return [None] * n + _bind(_tangent_p, *args[:n], *moved, **params)


def _lowering(primitive: Any, kernel: str | None) -> Callable[..., Any]:
    """How a platform lowers an equation: by a kernel that takes it, otherwise as the program that it carries."""

    def rule(ctx: Any, *xs: Any, program: Any, config: Config, has: tuple[str, ...], kernels: tuple[str, ...]) -> Any:
        run = jex.jaxpr_as_fun(program)
        if kernel in kernels:
            by_kernel = partial(_by_kernel, _PARTS[primitive], kernel, config, has)
            spread = _spread(ctx.module_context.axis_context, by_kernel, config, has, ctx.avals_in)
            if spread is not None and (kernel not in _MAY_BE_ABSENT or _is_here(spread, ctx.avals_in)):
                run = spread
        return mlir.lower_fun(run, multiple_results=True)(ctx, *xs)

    return rule


def _is_here(run: Callable[..., Any], avals: Sequence[Any]) -> bool:
    """Whether JAX finds the kernel: it asks cuDNN for its version, and a GPU that is here for its generation."""
    try:
        jax.eval_shape(run, *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _spread(
    context: Any, run: Callable[..., Any], config: Config, has: tuple[str, ...], avals: Sequence[Any]
) -> Callable[..., Any] | None:
    """`run` on every device of the mesh that a program is lowered for; None where that cannot be."""
    if not isinstance(context, mlir.ShardingContext):
        return None
    mesh = _ALONE if context.num_devices == 1 else avals[0].sharding.mesh
    sizes = dict(mesh.shape)
    n_data, n_model = sizes.get("data", 1), sizes.get("model", 1)
    if n_data * n_model != context.num_devices or config.n_kv_heads % n_model:
        return None
    data, model = ("data" if "data" in sizes else None), ("model" if "model" in sizes else None)
    batch = avals[0].shape[:-3]
    split = next((i for i in range(-1, -1 - len(batch), -1) if batch[i] % n_data == 0), None)

    def spec(shape: tuple[int, ...], rank: int) -> PartitionSpec:
        own = len(shape) - rank
        axes: list[str | None] = [None] * len(shape)
        if split is not None and own >= -split and shape[own + split] > 1:
            axes[own + split] = data
        if rank == 3:
            axes[-2] = model
        return PartitionSpec(*axes)

    ranks = (3, 3, 3, *(_RANKS[name] for name in has), *(3,) * (len(avals) - 3 - len(has)))
    ins = tuple(spec(a.shape, rank) for a, rank in zip(avals, ranks, strict=True))
    return jax.shard_map(run, mesh=mesh, in_specs=ins, out_specs=spec(avals[0].shape, 3), check_vma=False)


def _primitive(name: str, part: Callable[..., list[Array]]) -> Any:
    primitive = jex.Primitive(f"mechjax_{name}")
    primitive.multiple_results = True
    primitive.def_impl(lambda *xs, program, **_: jex.jaxpr_as_fun(program)(*xs))
    primitive.def_abstract_eval(lambda *_, program, **__: program.out_avals)
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    mlir.register_lowering(primitive, _lowering(primitive, None))
    _PARTS[primitive] = part
    return primitive


_PARTS: dict[Any, Callable[..., list[Array]]] = {}
_mix_p = _primitive("mix", _mix)
_tangent_p = _primitive("mix_tangent", _tangent)
_pullback_p = _primitive("mix_pullback", _pullback)
ad.primitive_jvps[_mix_p] = _jvp_of_mix
ad.primitive_jvps[_tangent_p] = partial(_jvp_of_derivative, _tangent_p)
ad.primitive_jvps[_pullback_p] = partial(_jvp_of_derivative, _pullback_p)
ad.primitive_transposes[_tangent_p] = _transpose_of_tangent
ad.primitive_transposes[_pullback_p] = _transpose_of_pullback
for _name, _kernel in KERNELS.items():
    for _p in (_mix_p, _pullback_p):  # a tangent has no kernel
        mlir.register_lowering(_p, _lowering(_p, _name), platform=_kernel.platform)
