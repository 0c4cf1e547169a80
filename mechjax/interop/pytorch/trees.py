"""Trees of tensors in what PyTorch modules take and return: tuples, lists, dictionaries and dataclasses."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from mechjax.base.errors import ArgumentError
from mechjax.base.optional import require


def changed(value: Any, at: tuple[str, ...], change: Callable[..., Any]) -> Any:
    """The value with every tensor in it changed; tuples, lists, dictionaries and dataclasses are looked into."""
    if isinstance(value, require("torch", extra="torch").Tensor):
        return change(value, at)
    parts = _parts(value)
    if parts is None:
        return value
    new = {key: changed(part, (*at, str(key)), change) for key, part in parts.items()}
    if all(new[key] is part for key, part in parts.items()):
        return value
    if isinstance(value, tuple):
        return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
    new_value = copy.copy(value)
    for key, part in new.items():
        if isinstance(value, (list, Mapping)):
            new_value[key] = part
        else:
            object.__setattr__(new_value, key, part)
    return new_value


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key; None for what is no container."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def plain(value: Any, at: tuple[str, ...] = ("output",)) -> Any:
    """What a module returned, as tuples, lists and dictionaries of tensors."""
    torch = require("torch", extra="torch")
    if value is None or isinstance(value, torch.Tensor):
        return value
    parts = _parts(value)
    if parts is None:
        return _Opaque(".".join(at), type(value).__name__)
    new = {key: plain(part, (*at, str(key))) for key, part in parts.items()}
    if isinstance(value, tuple):
        return type(value)(*new.values()) if hasattr(value, "_fields") else tuple(new.values())
    if isinstance(value, list):
        return list(new.values())
    return new


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Something in an output that is no tree of tensors."""

    place: str
    kind: str


def chosen(tree: Any, output: str | int | None) -> Any:
    """The part of the output that is asked for.

    Raises:
        ArgumentError: There is no such part, or it is no tree of tensors.
    """
    if output is not None:
        parts = _parts(tree) or {}
        if output not in parts:
            known = ", ".join(repr(key) for key in parts) or "no parts: it is one tensor"
            raise ArgumentError(f"the module's output has no {output!r}; it has {known}.")
        tree = parts[output]
    opaque = next((x for x in jax.tree.leaves(tree) if isinstance(x, _Opaque)), None)
    if opaque is not None:
        hint = " For a Hugging Face model: use_cache=False." if "Cache" in opaque.kind else ""
        raise ArgumentError(
            f"`{opaque.place}` of what the module returns is a {opaque.kind}, which is no tensor, tuple, list, "
            f"dictionary or dataclass of tensors.{hint} Or take one part of the output, as output='logits' does."
        )
    if not jax.tree.leaves(tree):
        raise ArgumentError("the module returns no tensor, so there is no function to make of it.")
    return tree
