"""`site`: an identity primitive that names an activation and lowers to nothing.

A site carries, as static parameters, its name, how many layers have it, the names of its axes (right-aligned) and,
inside `shard_map`, how it is partitioned; its layer travels as an operand, so scanned, unrolled and looped layers look
alike, and so does, in a loop along one of its axes, the index that is running. Batching records where the batch axis
stands instead of moving it (a move would cost a transpose in the untransformed program). Differentiation names tangents
and cotangents (`"resid_post@cotangent"`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array

from mechjax.base.errors import SiteError

site_p = jex.Primitive("mechjax_site")
site_p.def_impl(lambda x, *layer, **_: x)
site_p.def_abstract_eval(lambda x, *layer, **_: x)
mlir.register_lowering(site_p, lambda ctx, x, *layer, **_: [x])

_FLIPPED = {"tangent": "cotangent", "cotangent": "tangent", "primal": "cotangent"}


def _batch(args: Any, dims: Any, *, bdims: Any, **params: Any) -> Any:
    dim, *operand_dims = dims
    layer_dim = operand_dims[0] if operand_dims else None
    if any(other is not None for other in operand_dims[1:]):
        raise SiteError(
            f"site `{params['name']}` is vmapped over its index along `{params['along'][0]}`; all examples of a loop "
            "must be at the same index. Map inside the loop instead."
        )
    if dim is None and layer_dim is None:
        return site_p.bind(*args, bdims=bdims, **params), None
    if dim is None:  # only the layer is mapped: the value must carry the axis too
        args = (jnp.broadcast_to(args[0], (args[1].shape[layer_dim], *args[0].shape)), *args[1:])
        dim = 0
    return site_p.bind(*args, bdims=(*bdims, (dim, layer_dim)), **params), dim


def _jvp(primals: Any, tangents: Any, *, kind: str, **params: Any) -> Any:
    x, *layer = primals
    tangent = tangents[0]
    y = site_p.bind(x, *layer, kind=kind, **params)
    if kind == "primal" and type(tangent) is not ad.Zero:
        tangent = site_p.bind(tangent, *layer, kind="tangent", **params)
    return y, tangent


def _transpose(cotangent: Any, x: Any, *layer: Any, kind: str, **params: Any) -> Any:
    if type(cotangent) is not ad.Zero:
        cotangent = site_p.bind(cotangent, *layer, kind=_FLIPPED[kind], **params)
    return [cotangent] + [None] * len(layer)


batching.primitive_batchers[site_p] = _batch
ad.primitive_jvps[site_p] = _jvp
ad.primitive_transposes[site_p] = _transpose


def _int32(layer: Any) -> Any:
    """Constant layers stay constants (a numpy scalar becomes a literal), so that duplicates are seen while tracing."""
    if isinstance(layer, (int, np.integer)):
        return np.int32(layer)
    return jax.lax.convert_element_type(layer, jnp.int32)


def site(
    x: Array,
    name: str,
    *,
    layer: Any = None,
    layers: int | None = None,
    axes: tuple[str, ...] = (),
    spec: PartitionSpec | None = None,
    having: tuple[int, ...] | None = None,
    also: tuple[str, ...] = (),
    starts: tuple[tuple[str, int], ...] = (),
    along: tuple[str, Any, int] | None = None,
) -> Array:
    """Name the activation `x`; the identity, free in the compiled program.

    Args:
        x: The activation. Its last `len(axes)` dimensions are named by `axes`; dimensions before them are batch.
        name: The site's name. The same name may occur once per layer.
        layer: The layer, a Python or traced integer. None inside a `scan` means: the counter of the loop (of nested
            loops, row-major) is the layer. None outside a loop means: the site has no layers.
        layers: How many layers there are; needed with `layer`, and inside `while_loop`.
        axes: Names of the trailing dimensions, which edits and captures index by name.
        spec: Inside `shard_map`, how the last dimensions are partitioned over mesh axes (right-aligned with `x`).
        having: The layers that have the site, in order, where not all do; a capture stacks over these.
        also: Other names that it is asked for by, `{}` standing for the layer.
        starts: Axes of which the value holds only the indices from a number on: ("pos", 4). Edits and captures count
            from the axis' beginning all the same: what came before reads NaN, and edits there are misses.
        along: The axis that a loop runs along, the running index (traced), and how many there are: ("pos", t, 8). `x`
            is what is there at this index, with that axis of length 1; edits and captures see the whole axis, and an
            edit at one index is in what the loop carries to the next. Needs `layer`, and every index once.

    Returns:
        `x` unchanged.

    Raises:
        SiteError: `layer` without `layers`, a constant layer out of range, more axes than dimensions, or `along`
            without a layer, an axis of the site and length 1 there.
    """
    x = jnp.asarray(x)
    if len(axes) > x.ndim:
        raise SiteError(f"site `{name}` names {len(axes)} axes {axes}, but its value has shape {x.shape}.")
    if layer is not None and layers is None:
        raise SiteError(f"site `{name}` was given a layer but not how many there are: pass `layers=`.")
    if isinstance(layer, (int, np.integer)) and layers is not None and not 0 <= layer < layers:
        raise SiteError(
            f"site `{name}` was given layer {layer}; with layers={layers} it must be 0 to {layers - 1}."
        )
    operands = () if layer is None else (_int32(layer),)
    if along is not None:
        _check_along(x, name, axes, along[0], layer)
        operands = (*operands, jnp.asarray(along[1], jnp.int32))
    return site_p.bind(
        x,
        *operands,
        name=name,
        kind="primal",
        bdims=(),
        layers=layers,
        axes=tuple(axes),
        spec=spec,
        having=having,
        also=also,
        starts=starts,
        along=None if along is None else (along[0], along[2]),
    )


def _check_along(x: Array, name: str, axes: tuple[str, ...], axis: str, layer: Any) -> None:
    if axis not in axes or x.shape[x.ndim - len(axes) + axes.index(axis)] != 1:
        raise SiteError(
            f"site `{name}` runs along `{axis}`, one index at a time: its value, of shape {x.shape}, must have that "
            f"axis among {axes}, of length 1."
        )
    if layer is None:
        raise SiteError(
            f"site `{name}` runs along `{axis}`, so the loop's counter is no layer: pass `layer=` and `layers=` (0 and "
            "1 where there is one)."
        )
