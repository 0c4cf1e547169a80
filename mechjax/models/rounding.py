"""Which matrices are rounded to few bits, and how: symmetric, to the nearest, with a scale for each block of numbers.

    scale = max |W| / limit over a block        q = round(W / scale), from -limit to limit        limit = 127 or 7

A block is what an output sums over (as in LLM.int8(), Dettmers et al. 2022, arXiv:2208.07339, section 2), or a group of
neighbours in that (as in GPTQ, Frantar et al. 2022, arXiv:2210.17323, section 4, whose rounding is another). No number
is off by more than half a scale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError
from mechjax.models.quantized import Quantized

GROUP = 32
"""Numbers with one scale, in 4 bits, where nothing else is asked for."""
_LIMIT = {8: 127, 4: 7}
_CHUNK = 1 << 22  # numbers that are rounded at once on the host

_INTO_HEADS, _OUT_OF_HEADS, _PLAIN = (-3,), (-3, -2), (-2,)
_MATRICES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]], ...] = (
    (("attn", "cross"), ("W_Q", "W_K", "W_V"), _INTO_HEADS),
    (("attn", "cross"), ("W_O",), _OUT_OF_HEADS),
    (("attn",), ("W_UK", "W_UV"), _INTO_HEADS),
    (("attn",), ("W_DQ", "W_DKV", "W_KR"), _PLAIN),
    (("mlp", "moe", "shared"), ("W_in", "W_gate", "W_out"), _PLAIN),
    (("mixer",), ("W_gate", "W_x", "W_dt_in", "W_B", "W_C", "W_O"), _PLAIN),
)
MATRICES: Mapping[str, tuple[int, ...]] = {
    f"{part}.{name}": axes for parts, names, axes in _MATRICES for part in parts for name in names
}
"""What is rounded, in every structure: a part of a block and its parameter -> the axes that products sum over.

Kept in full are what is not in a block (embeddings, of patches too, the unembedding, heads that read the last stream);
what is no factor of a product (norms, biases, convolutions, `A_log`, `D`; `W_rel`, whose rows are looked up); and what
is small: routers, and `W_dt`, of which a Mamba's rates are made. Of a Mamba-2 of 8 layers drawn at random it is 1 part
in 210 of the blocks, and rounding it too was measured to add 6 % to the KL divergence in 8 bits, 14 % in 4. In a Mamba,
where that adds less than 1 %, it is 1 part in 50 and sums over `dt_rank` numbers, 48 in the smallest checkpoint, which
groups of 32 do not divide.
"""


@dataclass(frozen=True)
class Scheme:
    """How matrices are rounded.

    Attributes:
        bits: 8 or 4.
        group: Numbers that share a scale along what products sum over; None for all of them.
    """

    bits: int
    group: int | None


def scheme(bits: int, group: int | None) -> Scheme:
    """A scheme as users ask for it; in 4 bits groups are 32 unless told otherwise.

    Raises:
        ArgumentError: Other bits, or a group that is no number from 2.
    """
    if isinstance(bits, bool) or bits not in _LIMIT:
        raise ArgumentError(
            f"bits={bits!r}: weights are held in 8 bits or 4. For others, use `dtype=` of `mj.load`."
        )
    if group is not None and (isinstance(group, bool) or not isinstance(group, int) or group < 2):
        raise ArgumentError(
            f"group={group!r}: how many neighbouring weights share a scale, such as 32, 64 or 128; None for all that "
            f"an output sums over (8 bits) or {GROUP} (4 bits)."
        )
    return Scheme(bits, GROUP if group is None and bits == 4 else group)


def named_scheme(weights: str | None, group: int | None) -> Scheme | None:
    """A scheme by the name that `load` takes; None for None.

    Raises:
        ArgumentError: Another name, a group without one, or a group that is no number from 2.
    """
    if weights is None:
        if group is not None:
            raise ArgumentError(
                f'group={group} is for weights in few bits: pass `weights="int4"` or "int8" too.'
            )
        return None
    names = {f"int{bits}": bits for bits in _LIMIT}
    if weights not in names:
        raise ArgumentError(f"weights={weights!r}: they may be {', '.join(names)}, or None as `dtype` says.")
    return scheme(names[weights], group)


def is_matrix(path: str) -> bool:
    """Whether a parameter ("encoder.blocks.attn.W_Q") is rounded, which its last two names say."""
    return _key(path) in MATRICES


def scales(path: str, shape: tuple[int, ...], how: Scheme) -> tuple[int, ...]:
    """The shape of a matrix's scales: how many blocks it has along each axis.

    `W_O` of attention is summed over heads and their dimensions. A group is then whole heads, or a part of one: where
    it is neither, the largest part that divides both.

    Raises:
        ArgumentError: A group that does not divide what is summed over, or in 4 bits an odd number of dimensions.
    """
    axes = MATRICES[_key(path)]
    last = axes[-1]
    found, size, n_heads = list(shape), shape[last], math.prod(shape[axis] for axis in axes[:-1])
    if how.bits == 4 and size % 2:
        raise ArgumentError(
            f"`{path}` sums over {size} numbers, which is odd: two of 4 bits share a byte. Use 8 bits."
        )
    if how.group is None:
        found[last], group = 1, size * n_heads
    elif (size * n_heads) % (group := how.group):
        fits = ", ".join(str(n) for n in range(2, size * n_heads + 1) if (size * n_heads) % n == 0)
        raise ArgumentError(
            f"group={group} does not divide the {size * n_heads} numbers that outputs of `{path}` sum over: "
            f"{fits} do. All matrices of blocks are rounded alike, so choose one that divides every width that they "
            "read (`d_model`, and `d_mlp` or `d_inner`)."
        )
    elif group > size and group % size == 0:
        found[last] = 1
    else:
        found[last] = size // math.gcd(group, size)
    if found[last] == 1:
        for axis in axes[:-1]:
            found[axis] = n_heads // (group // size)
    return tuple(found)


def rounded(W: Any, path: str, how: Scheme) -> Quantized:
    """A matrix in few bits. The same numbers come of an array of JAX and of numpy, where it stays on the host.

    Args:
        W: Floats.
        path: The parameter of `MATRICES` that it is, or is a part of: leading axes may be missing.
        how: The scheme.
    """
    n, limit = scales(path, W.shape, how), _LIMIT[how.bits]
    packed = None if how.bits == 8 else MATRICES[_key(path)][-1]
    xp: Any = np if isinstance(W, np.ndarray) else jnp
    apart = W.reshape(
        [size for pair in zip(n, W.shape, strict=True) for size in (pair[0], pair[1] // pair[0])]
    )
    wide = apart.astype(np.promote_types(W.dtype, np.float32))
    largest = abs(wide).max(tuple(range(1, 2 * W.ndim, 2)), keepdims=True)
    scale = (largest * wide.dtype.type(1 / limit)).astype(W.dtype)  # as XLA divides by a constant
    cut = largest > (limit + 0.5) * scale.astype(wide.dtype)  # float16's smallest numbers are far apart
    scale = xp.where(cut, xp.nextafter(scale, xp.full_like(scale, xp.inf)), scale)
    scale = xp.where(scale.astype(wide.dtype) < np.finfo(wide.dtype).tiny, xp.ones_like(scale), scale)
    times = 1 / scale.astype(wide.dtype)  # XLA would multiply by it anyway, and must agree with numpy
    q = xp.clip(xp.round(wide * times), -limit, limit).astype(np.int8).reshape(W.shape)
    return Quantized(q if packed is None else _pairs(q, packed, xp), scale.reshape(n), packed)


def rounded_on_host(W: np.ndarray, dtype: Any, path: str, how: Scheme) -> Quantized:
    """What `rounded` makes of `W` in a dtype, a few outputs at a time, so that little of it is held in full."""
    step = max(1, _CHUNK // math.prod(W.shape[:-1]))
    with np.errstate(invalid="ignore"):  # what is not finite has a scale that is not
        parts = [rounded(W[..., i : i + step].astype(dtype), path, how) for i in range(0, W.shape[-1], step)]
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, -1), *parts)


def _key(path: str) -> str:
    return ".".join(path.split(".")[-2:])


def _pairs(q: Any, axis: int, xp: Any) -> Any:
    """Neighbours along an axis in one byte."""
    i = q.ndim + axis
    pairs = q.reshape(*q.shape[:i], -1, 2, *q.shape[i + 1 :]).view(np.uint8)
    first, second = (xp.take(pairs, half, i + 1) for half in (0, 1))
    return (first & np.uint8(15)) | (second << np.uint8(4))
