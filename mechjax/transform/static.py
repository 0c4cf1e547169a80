"""Callables as parts of pytrees: functions are static, modules with arrays are data."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


@jax.tree_util.register_pytree_node_class
class Held:
    """A plain function inside a pytree: no leaves, compared by identity of the function.

    Not an equinox module: equinox warns where a function that a JAX transform returned (`jax.vmap(model)`) is stored
    in one, since it takes it for a method.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.fn(*args, **kwargs)

    def tree_flatten(self) -> tuple[tuple[()], Callable[..., Any]]:
        """No leaves; the function is structure."""
        return (), self.fn

    @classmethod
    def tree_unflatten(cls, fn: Callable[..., Any], _: tuple[()]) -> "Held":
        """Hold the function again."""
        return cls(fn)


def hold(fn: Callable[..., Any]) -> Any:
    """`fn` itself where it is a pytree with arrays, else `fn` held as a static part."""
    if isinstance(fn, eqx.Module) or any(eqx.is_array(leaf) for leaf in jax.tree.leaves(fn)):
        return fn
    return Held(fn)


def unhold(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function that `hold` was given."""
    return fn.fn if isinstance(fn, Held) else fn


def with_static(module: Any, **fields: Any) -> Any:
    """The module with static fields changed. No constructor runs, so leaves may be mapped or abstract."""
    # As JAX rebuilds a pytree. `copy.copy` would have Equinox take it for one that is being made, and keep it for ever.
    changed = object.__new__(type(module))
    for name, value in (vars(module) | fields).items():
        object.__setattr__(changed, name, value)
    return changed
