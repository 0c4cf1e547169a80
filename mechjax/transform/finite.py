"""Where a run stopped being finite, for a message."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mechjax.base.errors import ArgumentError
from mechjax.base.whole import whole
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture, list_sites


def _finite(x: Array, info: Any) -> Array:
    return jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)


def check_sites_finite(fn: Callable[..., Any], *args: Any) -> None:
    """Look at every site of a run, in forward order. Cost: one run, of which a bit per site is kept.

    Raises:
        ArgumentError: One is not finite; it is named, with its layer.
    """
    names = [name for name, info in list_sites(fn, *args).items() if not info.stacked or info.layers]
    if not names or not all(map(is_concrete, jax.tree.leaves(args))):
        return
    _, acts = capture(fn, names, reduce=_finite)(*args)
    for name in names:
        fine = whole(acts[name])
        if not fine.all():
            layer = "" if not fine.ndim else f", layer {(acts.layers[name] or ())[int(fine.argmin())]}"
            raise ArgumentError(
                f"site `{name}`{layer} is not finite in a run without patches, so what follows from it is not either. "
                "Look at the inputs and weights there (half precision overflows above 65504)."
            )
