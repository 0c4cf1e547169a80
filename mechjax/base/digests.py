"""Checksums of pytrees and files: what tells one model, prompt or metric from another in what is on disk."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.whole import whole

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def arrays_digest(tree: Any) -> str:
    """SHA-256 of a pytree's arrays, of their names, shapes and dtypes. One array at a time is on the host.

    How arrays lie on devices changes nothing. Of one that several processes hold together each gets row by row over the
    network, and all must take part; `parts_digest` sends nothing, and tells what is here.
    """
    total = hashlib.sha256()
    for name, leaf in _named(tree):
        total.update(f"{name} {leaf.dtype} {leaf.shape or (1,)};".encode())
        in_one = is_within_reach(leaf) or not leaf.shape
        for part in [leaf] if in_one else (leaf[i] for i in range(leaf.shape[0])):
            total.update(_bytes_of(part))
    return total.hexdigest()


def parts_digest(tree: Any) -> str:
    """SHA-256 of the parts of a pytree's arrays that this process is the first to hold, and of where they lie.

    It is the same for the same arrays spread in the same way, and nothing is sent between processes.
    """
    total = hashlib.sha256()
    for name, leaf in _named(tree):
        spans = [([[0, n] for n in leaf.shape], leaf)]
        if isinstance(leaf, jax.Array):
            spans = [
                ([list(at.indices(n)[:2]) for at, n in zip(shard.index, leaf.shape, strict=True)], shard.data)
                for shard in leaf.addressable_shards
                if shard.replica_id == 0
            ]
        for span, part in sorted(spans, key=lambda item: item[0]):
            total.update(f"{name} {leaf.dtype} {leaf.shape} {span};".encode())
            total.update(_bytes_of(part))
    return total.hexdigest()


def tree_digest(tree: Any) -> str:
    """SHA-256 of a pytree's arrays and of all else that it holds, such as a model's choices."""
    arrays, rest = eqx.partition(tree, _is_array)
    return with_rest(rest, arrays_digest(arrays))


def with_rest(tree: Any, arrays: str) -> str:
    """The checksum of all of a pytree, from that of its arrays."""
    return hashlib.sha256(f"{_rest(tree)} {arrays}".encode()).hexdigest()


def lasts(tree: Any) -> bool:
    """Whether `tree_digest` is the same in another process: not where functions are told by their place in memory."""
    return not _ADDRESS.search(_rest(tree))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_leaves(tree: Any) -> list[Any]:
    """The arrays of a pytree, of JAX and numpy."""
    return [leaf for leaf in jax.tree.leaves(tree) if _is_array(leaf)]


def is_within_reach(array: Any) -> bool:
    """Whether this process holds all of an array."""
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable or array.is_fully_replicated


def _rest(tree: Any) -> str:
    leaves, structure = jax.tree.flatten(eqx.filter(tree, _is_array, inverse=True))
    return f"{structure} {leaves}"


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(eqx.filter(tree, _is_array))
    for path, leaf in leaves:
        yield jax.tree_util.keystr(path, simple=True, separator="."), leaf


def _bytes_of(array: Any) -> memoryview:
    """The bytes of an array; of random keys those of the numbers that they are made of."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.ascontiguousarray(whole(array)).reshape(-1).view(np.uint8).data


def _is_array(x: Any) -> bool:
    """Arrays of numpy too: printed as the rest is, long ones are cut short."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)
