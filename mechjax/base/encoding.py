"""Records as JSON and arrays, and back; no pickle, no code from files.

A class is looked up by name among the dataclasses that mechjax itself defines; anything else in a file is refused.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.base.whole import whole

_CLASS = re.compile(r"mechjax(\.[a-z][a-z0-9_]*)+:[A-Z][A-Za-z0-9]*")


def encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """The JSON node for `value`; arrays go to `arrays` under their path.

    Raises:
        ArgumentError: Something in it cannot be stored, such as a function.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):  # hexadecimal keeps every bit, and NaN and infinity too
        return {"float": value.hex()}
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return _encode_array(cast(Any, value), path, arrays)
    kind: Any = type(value)
    if kind in (tuple, list):
        return {kind.__name__: [encode(item, f"{path}.{i}", arrays) for i, item in enumerate(value)]}
    if isinstance(value, dict):
        pairs = cast(dict[Any, Any], value).items()
        return {"dict": [[encode(k, path, arrays), encode(v, f"{path}.{k}", arrays)] for k, v in pairs]}
    name = f"{kind.__module__}:{kind.__qualname__}"
    if dataclasses.is_dataclass(value) and _CLASS.fullmatch(name):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"class": name, "fields": {k: encode(v, f"{path}.{k}", arrays) for k, v in fields.items()}}
    return _refuse(value, path)


def _refuse(value: Any, path: str) -> Any:
    raise ArgumentError(
        f"cannot save `{path.lstrip('.') or 'it'}`: it is a {type(value).__module__}.{type(value).__qualname__}. "
        "Records hold arrays, numbers, text, tuples, lists, dictionaries and mechjax's own records; save those, "
        "and build the rest again."
    )


def _encode_array(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    node = {"array": path.lstrip("."), "of": "jax" if isinstance(value, jax.Array) else "numpy"}
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        node["key"] = str(jax.random.key_impl(value))
        value = jax.random.key_data(value)
    numbers = whole(value)
    if numbers.dtype.kind not in "fiubc":
        if not hasattr(jnp, numbers.dtype.name):
            _refuse(value, path)
        # bfloat16 and its kind: safetensors' numpy has no name for them, so their bits are stored.
        node["dtype"] = numbers.dtype.name
        numbers = numbers.view(f"u{numbers.dtype.itemsize}")
    arrays[path.lstrip(".")] = np.ascontiguousarray(numbers).reshape(numbers.shape)
    return node


def decode(node: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The value of a JSON node that `encode` made.

    Raises:
        CheckpointError: The node is not one that `encode` makes, or belongs to another version of a class.
    """
    if node is None or isinstance(node, (bool, int, str)):
        return node
    if not isinstance(node, dict):
        raise CheckpointError(f"`record.json` holds {node!r:.60}, which no record of mechjax contains.")
    fields = cast(dict[str, Any], node)
    kind = next(iter(fields), "")
    try:
        return _DECODERS[kind](fields, arrays)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"`record.json` holds {fields!r:.60}, which mechjax does not write.") from error


def _decode_array(node: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    name = str(node["array"])
    if name not in arrays:
        raise CheckpointError(f"`record.json` asks for the array `{name}`, which is not in the arrays' file.")
    numbers = arrays[name]
    if dtype := node.get("dtype"):
        scalar = getattr(jnp, dtype, None) if isinstance(dtype, str) else None
        if scalar is None:
            raise CheckpointError(
                f"the array `{name}` has dtype {dtype!r:.40}, which this JAX does not know."
            )
        numbers = numbers.view(jnp.dtype(scalar))
    if node.get("of") == "numpy":
        return numbers
    array = jnp.array(numbers)
    if array.dtype != numbers.dtype:
        raise CheckpointError(
            f"the array `{name}` was saved as {numbers.dtype}, and JAX now runs without 64-bit numbers. "
            'Call jax.config.update("jax_enable_x64", True) first.'
        )
    return jax.random.wrap_key_data(array, impl=node["key"]) if "key" in node else array


def _decode_class(node: dict[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    name, fields = str(node["class"]), dict[str, Any](node["fields"])
    cls = _find_class(name)
    declared, stored = {f.name for f in dataclasses.fields(cls)}, set(fields)
    if declared != stored:
        raise CheckpointError(
            f"the file holds a `{name}` with other fields than this version of mechjax: "
            f"{sorted(stored - declared)} are unknown here, {sorted(declared - stored)} are missing there. "
            "Restore it with the version that saved it."
        )
    # As JAX rebuilds a pytree: no constructor runs, so what was saved is what comes back.
    value = object.__new__(cls)
    for field, child in fields.items():
        object.__setattr__(value, field, decode(child, arrays))
    return value


def _find_class(name: str) -> Any:
    module, _, cls_name = name.partition(":")
    if _CLASS.fullmatch(name):
        try:
            cls = getattr(importlib.import_module(module), cls_name, None)
        except ModuleNotFoundError:
            cls = None
        if isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__ == module:
            return cls
    raise CheckpointError(
        f"the file asks for the class {name!r:.80}; mechjax has none of that name, and nothing else is ever loaded."
    )


_Decoder = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
_DECODERS: dict[str, _Decoder] = {
    "float": lambda node, arrays: float.fromhex(node["float"]),
    "array": _decode_array,
    "tuple": lambda node, arrays: tuple(decode(item, arrays) for item in node["tuple"]),
    "list": lambda node, arrays: [decode(item, arrays) for item in node["list"]],
    "dict": lambda node, arrays: {decode(k, arrays): decode(v, arrays) for k, v in node["dict"]},
    "class": _decode_class,
}
