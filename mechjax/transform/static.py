"""Callables as parts of pytrees: functions are static, modules with arrays are data."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax


class Held(eqx.Module):
    """A plain function inside a pytree, compared by identity.

    Functions that JAX transforms return (`jax.vmap(model)`) are held here too: equinox warns where one is stored as a
    field itself, since it takes it for a method.
    """

    held: tuple[Callable[..., Any]] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return self.held[0](*args, **kwargs)


def hold(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` itself where it is a pytree with arrays, else `fn` held as a static part."""
    if isinstance(fn, eqx.Module) or any(eqx.is_array(leaf) for leaf in jax.tree.leaves(fn)):
        return fn
    return Held((fn,))


def unhold(fn: Callable[..., Any]) -> Callable[..., Any]:
    """The function that `hold` was given."""
    return fn.held[0] if isinstance(fn, Held) else fn
