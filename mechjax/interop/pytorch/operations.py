"""Operations of PyTorch in JAX that torchax lacks or has otherwise. Each is tested against torch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from mechjax.base.errors import ShapeError, UnsupportedModelError


def _check(condition: Any, message: str = "") -> None:
    if not condition:
        raise ShapeError(f"the exported graph does not hold for these sizes: {message}")


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = jnp.matmul(x, weight.T)
    return out if bias is None else out + bias


def _attention(
    q: Array, k: Array, v: Array, mask: Array | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Array:  # fmt: skip
    """`scaled_dot_product_attention`: softmax in 32 bits, and zero where a query may look at nothing."""
    if dropout_p:
        raise UnsupportedModelError(
            f"attention with dropout_p={dropout_p} draws random numbers; set it to 0."
        )
    if enable_gqa:
        k, v = (jnp.repeat(x, q.shape[-3] // x.shape[-3], axis=-3) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.matmul(q * jnp.asarray(scale, q.dtype), k.mT).astype(jnp.promote_types(q.dtype, jnp.float32))
    if is_causal:
        mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    if mask is not None and mask.dtype == bool:
        scores = jnp.where(mask, scores, -jnp.inf)
    elif mask is not None:
        scores = scores + mask
    highest = scores.max(-1, keepdims=True)
    blind = jnp.isneginf(highest)
    weights = jnp.exp(scores - lax.stop_gradient(jnp.where(blind, 0, highest)))
    total = weights.sum(-1, keepdims=True)
    pattern = weights / jnp.where(blind, 1, total)
    return jnp.matmul(pattern.astype(v.dtype), v)


def _grouped_matmul(x: Array, weight: Array, offsets: Array) -> Array:
    """Rows up to `offsets[0]` times the first matrix, up to `offsets[1]` times the second, and so on; others are zero.

    Rows go through in blocks of one matrix each: `lax.ragged_dot`, which is this, cannot be mapped over, nor swept.
    """
    n, groups = x.shape[0], weight.shape[0]
    size = max(
        8, min(128, -(-n // (8 * groups)) * 8)
    )  # about one block for each matrix, in eights, as chips have them
    begins = jnp.concatenate([jnp.zeros(1, offsets.dtype), offsets[:-1]])
    blocks = -(-(offsets - begins) // size)
    ends = jnp.cumsum(blocks, dtype=offsets.dtype)
    block = jnp.arange(n // size + groups, dtype=offsets.dtype)  # as many as there can be
    group = jnp.minimum(jnp.searchsorted(ends, block, side="right"), groups - 1)
    first = begins[group] + (block - (ends - blocks)[group]) * size
    rows = first[:, None] + jnp.arange(size, dtype=offsets.dtype)
    rows = jnp.where((rows < offsets[group][:, None]) & (block < ends[-1])[:, None], rows, n)

    @jax.checkpoint
    def step(_: None, given: tuple[Array, Array]) -> tuple[None, Array]:
        taken, group = given
        return None, jnp.matmul(taken, weight[group], precision=lax.Precision.HIGHEST)

    made = lax.scan(step, None, (jnp.take(x, rows, axis=0, mode="fill", fill_value=0), group))[1]
    return jnp.zeros((n, made.shape[-1]), made.dtype).at[rows].set(made, mode="drop")


def _masked_scatter(x: Array, mask: Array, source: Array) -> Array:
    """The numbers of `source`, in order, where the mask is true; NaN where there are too few."""
    mask = jnp.broadcast_to(mask, x.shape)
    place = jnp.cumsum(mask.ravel()) - 1
    taken = jnp.take(source.ravel(), jnp.where(mask.ravel(), place, 0), mode="fill")
    return jnp.where(mask, taken.reshape(x.shape), x)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "mechjax.stop.default": lax.stop_gradient,
    "aten.linear.default": _linear,
    "aten.matmul.default": jnp.matmul,
    "aten.scaled_dot_product_attention.default": _attention,
    "transformers.grouped_mm_fallback.default": _grouped_matmul,  # experts, as transformers exports them
    "aten._grouped_mm.default": _grouped_matmul,
    "aten.masked_scatter.default": _masked_scatter,
    "aten._is_all_true.default": jnp.all,
    "aten._assert_async.msg": _nothing,  # a check of numbers, which a compiled program cannot raise for
    "aten.sym_size.int": lambda x, axis: x.shape[axis],
    "aten.sym_numel.default": lambda x: x.size,
    "aten._assert_scalar.default": _check,
    "aten._assert_tensor_metadata.default": _nothing,
    "aten.sym_constrain_range_for_size.default": _nothing,
    "aten.sym_constrain_range.default": _nothing,
    "aten.alias.default": lambda x: x,
}
