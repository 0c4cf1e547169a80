"""Matrices held as whole numbers of 8 or 4 bits and scales: `W = q * scale`, multiplied within the product.

Two numbers of 4 bits share a byte, neighbours along the last axis that products sum over. (`jnp.int4` is not used: XLA
for CPU unpacks the matrices of all layers before a scan begins, and `nbytes` counts a byte for each number.)
"""

from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer

_OF_ARRAYS = frozenset(name for name in dir(jax.Array) if not name.startswith("_"))


class Quantized(eqx.Module):
    """A matrix in few bits, which products take as it is; whoever else reads it sees the array that it stands for.

    Attributes:
        q: Whole numbers from -127 to 127, or two from -7 to 7 in a byte, the first in its lower half.
        scale: What they are multiplied by. It has as many axes as the matrix, each of a size that divides the
            matrix's: a scale is that of a block.
        packed: The axis (from the end) along which two numbers share a byte; None where none do.
    """

    q: Integer[Array | np.ndarray, "..."]
    scale: Float[Array | np.ndarray, "..."]
    packed: int | None = eqx.field(static=True, default=None)

    @property
    def bits(self) -> int:
        """Bits of a number."""
        return 8 if self.packed is None else 4

    @property
    def shape(self) -> tuple[int, ...]:
        """The matrix's shape."""
        sizes = list(self.q.shape)
        if self.packed is not None:
            sizes[self.packed] *= 2
        return tuple(sizes)

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.q.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the scales, and of the array that this stands for."""
        return self.scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of numbers and scales."""
        return nbytes(self)

    def numbers(self, dtype: DTypeLike) -> Array:
        """The whole numbers, apart, in a dtype."""
        if self.packed is None:
            return jnp.asarray(self.q, dtype)
        i = len(self.q.shape) + self.packed
        pairs = jnp.expand_dims(lax.bitcast_convert_type(self.q, jnp.int8), i + 1)
        halves = jnp.array([4, 0], jnp.int8).reshape(-1, *[1] * (pairs.ndim - i - 2))
        pairs, halves = jnp.broadcast_arrays(
            pairs, halves
        )  # as one shift: stacked, it takes fifteen times as long
        return (
            lax.shift_right_arithmetic(lax.shift_left(pairs, halves), jnp.int8(4))
            .reshape(self.shape)
            .astype(dtype)
        )

    def full(self) -> Array:
        """The array that this stands for, each number rounded once."""
        sizes = [
            (n, size // n) if 1 < n < size else (size,)
            for n, size in zip(self.scale.shape, self.shape, strict=True)
        ]
        apart = [n for pair in sizes for n in pair]
        scales = [m for n, pair in zip(self.scale.shape, sizes, strict=True) for m in (n, 1)[: len(pair)]]
        return (self.numbers(self.dtype).reshape(apart) * jnp.reshape(self.scale, scales)).reshape(self.shape)

    def outside(self, spec: str) -> Array | None:
        """Of a product `einsum(spec, x, self)`, the scale of each result; None where scales differ within its sums."""
        own, out = spec.split(",")[1].split("->")
        summed = tuple(i for i, letter in enumerate(own) if letter not in out)
        kept = "".join(letter for letter in own if letter in out)
        sizes = zip(own, self.scale.shape, self.shape, strict=True)
        if not out.endswith(kept) or not all(n == 1 or (c in out and n == size) for c, n, size in sizes):
            return None
        return jnp.squeeze(self.scale, summed)

    def __jax_array__(self) -> Array:
        return self.full()

    def __getitem__(self, index: Any) -> Array:
        return self.full()[index]

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        if name in _OF_ARRAYS:
            return getattr(self.full(), name)
        raise AttributeError(f"`Quantized` has no `{name}`, nor have arrays.")


Weight = Array | Quantized
"""What a matrix of a block may be."""


def is_quantized(x: Any) -> TypeGuard[Quantized]:
    """Whether `x` is a matrix in few bits."""
    return isinstance(x, Quantized)


def full(tree: Any) -> Any:
    """A pytree with arrays in place of matrices in few bits."""
    return jax.tree.map(lambda x: x.full() if is_quantized(x) else x, tree, is_leaf=is_quantized)


def holds_quantized(tree: Any) -> bool:
    """Whether a pytree has matrices in few bits."""
    return any(map(is_quantized, jax.tree.leaves(tree, is_leaf=is_quantized)))


def merged(W: Float[Weight, "head d_head d_model"]) -> Float[Weight, "both d_model"]:
    """A matrix with its first two axes as one."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), W)


def nbytes(tree: Any) -> int:
    """Bytes of the arrays of a pytree, which may be shapes."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "shape"))
