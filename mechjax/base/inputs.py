"""What a function is called on, said as one thing: an array, a tuple of arguments, or a mapping of named ones.

A decoder takes tokens. Other functions take whatever they take, so methods that run one on a clean and a corrupt side
are given each side whole.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.prompts import Prompts

MASK = "attention_mask"
"""The argument that says which tokens are real, as transformers names it."""


class Inputs(eqx.Module):
    """The arguments of a call: `fn(*args, **kwargs)`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def mask(self) -> Any:
        """True at real tokens: that of `Prompts`, or the argument `attention_mask`; None where nobody says."""
        said = [x.mask for x in self.args if isinstance(x, Prompts)]
        if self.kwargs.get(MASK) is not None:
            said.append(self.kwargs[MASK] != 0)
        return said[0] if said else None


def inputs_of(given: Any) -> Inputs:
    """The call that is meant by what stands for its inputs.

    Args:
        given: A tuple of positional arguments, a mapping of named ones, or the one argument (an array, a list of
            numbers, `Prompts`, any pytree).
    """
    args, kwargs = ((given,), {})
    if isinstance(given, Inputs):
        args, kwargs = given.args, given.kwargs
    elif type(given) is tuple:
        args = given
    elif isinstance(given, Mapping):
        args, kwargs = (), dict(given)
    args = tuple(np.asarray(x) if isinstance(x, list) else x for x in args)
    arrays = lambda x: jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x
    return Inputs(*jax.tree.map(arrays, (args, kwargs)))
