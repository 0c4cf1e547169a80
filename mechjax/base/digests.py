"""Checksums of pytrees: what tells one model, prompt or metric from another in a file that is gone on with."""

import hashlib
from typing import Any

import equinox as eqx
import jax
import numpy as np

from mechjax.base.whole import whole


def arrays_digest(tree: Any) -> str:
    """SHA-256 of a pytree's arrays, of their names, shapes and dtypes. One array at a time is on the host."""
    total = hashlib.sha256()
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, _is_array))
    for path, leaf in leaves:
        array = np.ascontiguousarray(whole(leaf))
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        total.update(f"{name} {array.dtype} {array.shape};".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def tree_digest(tree: Any) -> str:
    """SHA-256 of a pytree's arrays and of all else that it holds, such as a model's choices."""
    arrays, rest = eqx.partition(tree, _is_array)
    leaves, structure = jax.tree.flatten(rest)
    return hashlib.sha256(f"{structure} {leaves} {arrays_digest(arrays)}".encode()).hexdigest()


def _is_array(x: Any) -> bool:
    """Arrays of numpy too: printed as the rest is, long ones are cut short."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)
