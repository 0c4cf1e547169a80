"""The masks that the layers of a model have, which kernels need while they are compiled.

Layers are one scanned program, and a layer's window is a number in it. A kernel's mask is no number, so there is one
kernel for each window that the model has (two in Gemma, GPT-Neo and gpt-oss), of which `lax.switch` runs the layer's. A
mask that is data would be as large as the scores that a kernel is there to avoid.

Windows count real tokens, kernels count slots. These agree where no padding stands between real tokens, which only the
mask at run time says: where it does, the switch's last branch is the attention without kernels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from mechjax.models.config import Config

Mixer = Callable[[Array, Array, Array], Array]
"""Mixtures of values, of queries, keys and values of shapes (*batch, pos, head, d_head)."""
Mixed = Callable[[Config, int | None, Array | None, Array, Array, Array], Array]
"""The same of a config, a window and which tokens are real too."""


def distinct(config: Config, n_pos: int) -> tuple[int | None, ...]:
    """The windows that layers have, None for a layer that sees all `n_pos` tokens."""
    windows = config.windows or (None,)
    return tuple(dict.fromkeys(None if w is None or w >= n_pos else w for w in windows))


def cases(
    config: Config,
    mixed: Mixed,
    elsewise: Mixer,
    n_pos: int,
    *,
    real: Bool[Array, "... pos"] | None,
    window: Int[Array, ""] | None,
    one_run: bool,
) -> tuple[Int[Array, ""], list[Mixer]]:
    """Mixtures of values as functions of (q, k, v), and which of them a layer is.

    Args:
        config: The model's.
        mixed: The mixture by a kernel, as a function of a window and which tokens are real too.
        elsewise: The mixture without one.
        n_pos: How many tokens there are.
        real: Which are real; None where all are.
        window: The layer's; None where no layer has one.
        one_run: Whether the kernel asks that real tokens are in one run, window or not.
    """
    windows = distinct(config, n_pos)
    found: list[Mixer] = [partial(mixed, config, w, real) for w in windows]
    index = jnp.int32(0)
    if window is not None and len(windows) > 1:
        sizes = jnp.array([n_pos if w is None else w for w in windows], jnp.int32)
        index = jnp.argmax(sizes == jnp.minimum(window, n_pos)).astype(jnp.int32)
    if real is None or (windows == (None,) and not one_run):
        return index, found
    asks = jnp.array([one_run or w is not None for w in windows])[index]
    return jnp.where(asks & ~in_one_run(real), jnp.int32(len(windows)), index), [*found, elsewise]


def in_one_run(real: Bool[Array, "*batch pos"]) -> Bool[Array, ""]:
    """Whether every example has real tokens, and no padding between them."""
    before = jnp.pad(real[..., :-1], [(0, 0)] * (real.ndim - 1) + [(1, 0)])
    return ((real & ~before).sum(-1) == 1).all()


def switch(index: Int[Array, ""], branches: Sequence[Callable[..., Any]], *args: Any) -> Any:
    """`lax.switch`, and no switch where there is nothing to choose."""
    return branches[0](*args) if len(branches) == 1 else lax.switch(index, branches, *args)
