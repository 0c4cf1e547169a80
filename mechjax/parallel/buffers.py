"""An array that is filled piece by piece on the host and then handed to JAX: whole, or each device's part by itself."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

_XLA_ALIGNMENT = 64  # bytes; host buffers that begin at a multiple of it need no copy on CPU
_LINE, _LARGE = 64, 1 << 16  # bytes of a line of the cache; of an array that is worth the trouble


class Shards:
    """The parts of an array that this process's devices hold, on the host; `put` fills them, `array` hands them over.

    Cost: the bytes of those parts; of what is put, only what lies in them is read.
    """

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding | None = None):
        """Uninitialised buffers, one for each distinct part.

        Args:
            shape: The whole array's.
            dtype: Its dtype.
            sharding: Where it is to lie; None for the default device.
        """
        self._shape, self._sharding = shape, sharding
        self._where: dict[Any, tuple[slice, ...]] = {}
        if sharding is not None:
            found = sharding.addressable_devices_indices_map(shape)
            self._where = {
                device: _bounded(index, shape) for device, index in found.items() if index is not None
            }
        parts = set(map(_key, self._where.values())) or {tuple((0, n) for n in shape)}
        self._buffers = {
            part: _aligned(tuple(stop - start for start, stop in part), dtype) for part in sorted(parts)
        }

    def put(self, values: np.ndarray, place: tuple[int, ...] = ()) -> None:
        """Fill what stands at an index of the first axes with a view, of which only this process's parts are read."""
        n = len(place)
        for part, buffer in self._buffers.items():
            if all(start <= at < stop for at, (start, stop) in zip(place, part, strict=False)):
                here = tuple(at - start for at, (start, _) in zip(place, part, strict=False))
                _copy(buffer[(*here, ...)], values[(*(slice(start, stop) for start, stop in part[n:]), ...)])

    def array(self) -> jax.Array:
        """What was filled, as an array of JAX, which takes the buffers over without a copy where it can (on CPU)."""
        # Waiting here frees each host buffer before the next is made, where devices have memory of their own.
        if self._sharding is None:
            (buffer,) = self._buffers.values()
            return jax.block_until_ready(jax.device_put(buffer, may_alias=True))
        parts = [
            jax.device_put(self._buffers[_key(index)], device, may_alias=True)
            for device, index in self._where.items()
        ]
        made = jax.make_array_from_single_device_arrays(self._shape, self._sharding, parts)
        return jax.block_until_ready(made)


def _copy(to: np.ndarray, values: np.ndarray) -> None:
    """`to[...] = values`; where axes are permuted, in columns as wide as a line of the cache: four times as fast."""
    shape, n_inner = values.shape, max(1, _LINE // to.itemsize)
    steps = [stride if n > 1 else math.inf for stride, n in zip(values.strides, shape, strict=True)]
    fastest = int(np.argmin(steps)) if shape else 0
    if fastest >= len(shape) - 1 or values.nbytes < _LARGE:
        to[...] = values
        return
    for between in np.ndindex(shape[fastest + 1 : -1]):
        for start in range(0, shape[-1], n_inner):
            at = (*(slice(None),) * (fastest + 1), *between, slice(start, start + n_inner))
            to[at] = values[at]


def _bounded(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*i.indices(n)[:2]) for i, n in zip(index, shape, strict=True))


def _key(index: tuple[slice, ...]) -> tuple[tuple[int, int], ...]:
    return tuple((i.start, i.stop) for i in index)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array that XLA's CPU backend takes over as it is, instead of copying it."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + _XLA_ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _XLA_ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)
