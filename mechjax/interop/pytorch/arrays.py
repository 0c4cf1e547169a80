"""Arrays of PyTorch, NumPy and JAX as one another. Without `jax_enable_x64`, eight bytes become four."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.base.optional import require


def array_dtype(dtype: Any, *, of: str) -> np.dtype:
    """JAX's dtype for torch's.

    Raises:
        UnsupportedModelError: JAX has none, as for quantised numbers.
    """
    name = str(dtype).removeprefix("torch.")
    try:
        return jax.dtypes.canonicalize_dtype(jnp.dtype(name))
    except TypeError as error:
        raise UnsupportedModelError(
            f"{of} is of torch's dtype {name}, which JAX does not have. Convert the module first: module.float()."
        ) from error


def from_tensor(tensor: Any, *, of: str) -> jax.Array:
    """A copy of a tensor's numbers.

    Raises:
        ArgumentError: A whole number needs more than 32 bits and `jax_enable_x64` is off.
        UnsupportedModelError: It has no numbers (it is on torch's "meta" device) or a dtype that JAX does not have.
    """
    if tensor.is_meta:
        raise UnsupportedModelError(
            f"{of} lies on torch's meta device: it has a shape but no numbers. Load the weights first."
        )
    dtype = array_dtype(tensor.dtype, of=of)
    tensor = tensor.detach().cpu().contiguous()
    if dtype.itemsize < tensor.element_size() and dtype.kind in "iu":
        return in_range(tensor.numpy(), dtype, of=of)
    if dtype.itemsize < tensor.element_size():
        return jnp.asarray(tensor.numpy().astype(dtype))
    if dtype.kind in "biufc":
        return jnp.array(tensor.numpy(), dtype)
    torch = require("torch", extra="torch")
    bits = tensor.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize])  # bfloat16, which NumPy lacks
    return jnp.array(bits.numpy().view(dtype))


def to_tensor(array: Any) -> Any:
    """A tensor with an array's numbers; `int32` as `int64`, which is what torch indexes by."""
    torch = require("torch", extra="torch")
    array = np.array(array)
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array)


def in_range(array: np.ndarray, dtype: np.dtype, *, of: str) -> jax.Array:
    """Whole numbers in fewer bits.

    Raises:
        ArgumentError: They do not fit.
    """
    bounds = jnp.iinfo(dtype)
    if array.size and (array.min() < bounds.min or array.max() > bounds.max):
        raise ArgumentError(
            f"{of} holds whole numbers past {dtype.name}. Switch on 64 bits: jax.config.update('jax_enable_x64', True)."
        )
    return jnp.asarray(array.astype(dtype))
