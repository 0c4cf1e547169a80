"""What a program costs before it runs: floating-point operations and live memory, counted from its jaxpr.

Nothing is compiled or allocated. XLA's own count takes the body of a scan once, whatever its length; here it counts
by its length, a `cond` by its dearest branch, and what cannot be known (the trips of a `while`, a hand-written
kernel) is named instead of guessed.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.extend.core import primitives as jp

from mechjax.base.records import Record
from mechjax.transform import compat
from mechjax.transform.table import inner_jaxprs, site_name


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _names("""
    abs acos acosh add add_any asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp cos
    cosh cumlogsumexp cummax cummin cumprod cumsum digamma div eq erf erf_inv erfc exp exp2 expm1 floor
    ge gt integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter pow rem
    round rsqrt sign sin sinh sqrt square sub tan tanh
""")
_REDUCTIONS = _names("""
    argmax argmin pmax pmin psum psum_invariant reduce reduce_max reduce_min reduce_precision
    reduce_prod reduce_scatter reduce_sum reduce_window reduce_window_max reduce_window_min
    reduce_window_sum
""")
_SCATTERS = _names("scatter-add scatter-max scatter-min scatter-mul scatter-sub")
_MOVES = _names("""
    after_all all_gather all_gather_invariant all_to_all and approx_top_k axis_index
    bitcast_convert_type broadcast_in_dim clz complex concatenate conj convert_element_type copy copy_p
    create_token device_put dynamic_slice dynamic_update_slice empty empty2 eq_to expand_dims gather
    imag iota le_to lt_to name not optimization_barrier or pad pcast population_count ppermute pvary
    random_bits random_clone random_fold_in random_seed random_split random_unwrap random_wrap real
    reduce_and reduce_or reduce_xor reshape reshard rev rng_bit_generator rng_uniform scatter select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical slice sort split squeeze
    stack stop_gradient threefry2x32 tile top_k transpose xor
""")


class Cost(Record):
    """What one call of a program costs. A multiplication and an addition are two operations.

    Attributes:
        contractions: Operations of matrix products and convolutions (static).
        elementwise: Those of floating arithmetic element by element and of sums; `exp` counts one (static).
        peak_bytes: The most that intermediates and outputs hold at once, in the program's order, arguments aside. An
            estimate: XLA's fusions need less and its copies more (static).
        unknown: What was not counted, or counted too low, in words (static).
    """

    contractions: int = eqx.field(static=True)
    elementwise: int = eqx.field(static=True)
    peak_bytes: int = eqx.field(static=True)
    unknown: tuple[str, ...] = eqx.field(static=True)

    @property
    def flops(self) -> int:
        """All floating-point operations."""
        return self.contractions + self.elementwise


def cost(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """What `fn(*args, **kwargs)` costs. Zero FLOPs: only shapes are looked at.

    Args:
        fn: Any JAX function or module.
        *args: Arrays, or `jax.ShapeDtypeStruct`s.
        **kwargs: The same.
    """
    return jaxpr_cost(traced(fn, *args, **kwargs))


def traced(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The program of `fn(*args, **kwargs)`, of shapes alone: its arrays and shapes are what it takes."""
    leaves, tree = jax.tree.flatten((fn, args, kwargs))
    shapes = [isinstance(x, jax.ShapeDtypeStruct) or eqx.is_array(x) for x in leaves]

    def flat(arrays: list[Any]) -> list[Any]:
        values = iter(arrays)
        filled = [next(values) if is_shape else x for x, is_shape in zip(leaves, shapes, strict=True)]
        fn, args, kwargs = jax.tree.unflatten(tree, filled)
        return [x for x in jax.tree.leaves(fn(*args, **kwargs)) if eqx.is_array_like(x)]

    return jax.make_jaxpr(flat)([x for x, s in zip(leaves, shapes, strict=True) if s])


def jaxpr_cost(closed_jaxpr: Any) -> Cost:
    """What a traced program costs."""
    unknown: dict[str, None] = {}
    contractions, elementwise = _operations(closed_jaxpr.jaxpr, unknown)
    return Cost(contractions, elementwise, peak(closed_jaxpr), tuple(unknown))


def n_programs(closed_jaxpr: Any) -> int:
    """How many programs with matrix products a call compiles: distinct ones under `jit`, or the whole as one."""
    found, loose = set[int](), False
    for eqn in closed_jaxpr.jaxpr.eqns:
        heavy = _of_equation(eqn, {})[0] > 0
        if heavy and "jaxpr" in eqn.params and eqn.primitive.name in ("jit", "pjit"):
            found.add(id(eqn.params["jaxpr"]))
        else:
            loose = loose or heavy
    return len(found) + loose


def _operations(jaxpr: Any, unknown: dict[str, None]) -> tuple[int, int]:
    """Operations of contractions, and of everything else."""
    total = [0, 0]
    for eqn in jaxpr.eqns:
        for kind, n in enumerate(_of_equation(eqn, unknown)):
            total[kind] += n
    return total[0], total[1]


def _of_equation(eqn: Any, unknown: dict[str, None]) -> tuple[int, int]:
    name = eqn.primitive.name
    if name in _CONTRACTIONS:
        return _CONTRACTIONS[name](eqn), 0
    if name in _MOVES or site_name(eqn) is not None:
        return 0, 0
    if name in _ELEMENTWISE:
        return 0, _floats(eqn) * math.prod(eqn.outvars[0].aval.shape)
    if name in _REDUCTIONS:
        return 0, _floats(eqn) * math.prod(eqn.invars[0].aval.shape)
    if name in _SCATTERS:
        return 0, _floats(eqn) * math.prod(eqn.invars[2].aval.shape)
    inner = [] if name == "pallas_call" else list(inner_jaxprs(eqn))
    if not inner:
        return _estimated(eqn, unknown)
    return _of_programs(eqn, [_operations(getattr(j, "jaxpr", j), unknown) for j in inner], unknown)


def _of_programs(eqn: Any, parts: list[tuple[int, int]], unknown: dict[str, None]) -> tuple[int, int]:
    """The programs inside an equation, as often as they run."""
    if eqn.primitive is jp.cond_p:
        return max(parts, key=sum)
    times = 1
    if eqn.primitive is jp.scan_p:
        times = eqn.params["length"]
    elif eqn.primitive is jp.while_p:
        unknown["a while loop, whose body is counted once"] = None
    elif eqn.primitive.name == "shard_map":  # its program is that of one device
        times = math.prod(eqn.params["mesh"].shape[axis] for axis in compat.manual_axes(eqn.params))
    return times * sum(p[0] for p in parts), times * sum(p[1] for p in parts)


def _estimated(eqn: Any, unknown: dict[str, None]) -> tuple[int, int]:
    """What the author of a kernel says that it costs."""
    estimate = eqn.params.get("cost_estimate")
    if estimate is not None:
        return int(estimate.flops), int(estimate.transcendentals)
    unknown[f"`{eqn.primitive.name}`, which is not counted"] = None
    return 0, 0


def _floats(eqn: Any) -> bool:
    """Whether it computes with floating numbers: positions, masks and hashes are no FLOPs."""
    return any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars)


def _dot(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _ragged_dot(eqn: Any) -> int:
    """Every row meets one group's matrix, where rows are what is ragged."""
    (contracted, _), _ = eqn.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    left = eqn.invars[0].aval.shape
    out = math.prod(eqn.outvars[0].aval.shape)
    ragged = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
    if ragged and ragged[0] in contracted:  # each row belongs to one of the output's groups
        groups = eqn.invars[2].aval.shape[-1]
        return 2 * out // groups * math.prod(left[d] for d in contracted)
    return 2 * out * math.prod(left[d] for d in contracted)


def _convolution(eqn: Any) -> int:
    kernel = eqn.invars[1].aval.shape
    out_feature = eqn.params["dimension_numbers"].rhs_spec[0]
    per_output = math.prod(kernel) // kernel[out_feature]  # its input features are those of one group
    return 2 * math.prod(eqn.outvars[0].aval.shape) * per_output


_CONTRACTIONS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot": _ragged_dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)


def peak(closed_jaxpr: Any, bytes_of: Callable[[Any], int] = _bytes) -> int:
    """Bytes that are alive at once, arguments aside.

    Args:
        closed_jaxpr: A traced program.
        bytes_of: The bytes of an array, given as what has a shape and a dtype: those on one device, for example.
    """
    return _peak(closed_jaxpr.jaxpr, bytes_of)


def _peak(jaxpr: Any, bytes_of: Callable[[Any], int]) -> int:
    """Bytes that are alive at once: a value from where it is made to where it is last read."""
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, jex.Var)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if isinstance(v, jex.Var)}
    dying: dict[int, int] = {}
    alive = peak = 0
    for i, eqn in enumerate(jaxpr.eqns):
        made = 0 if site_name(eqn) is not None else sum(bytes_of(v.aval) for v in eqn.outvars)
        inside = max((_peak(getattr(j, "jaxpr", j), bytes_of) for j in inner_jaxprs(eqn)), default=0)
        loop = eqn.primitive is jp.scan_p  # beside its stacked outputs it holds those of a step
        peak = max(peak, alive + (made + inside if loop else max(made, inside)))
        for v in eqn.outvars:
            end = last.get(v, i)
            dying[end] = dying.get(end, 0) + (0 if site_name(eqn) is not None else bytes_of(v.aval))
        alive += made - dying.pop(i, 0)
    return peak
