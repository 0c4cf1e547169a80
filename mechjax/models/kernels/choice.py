"""Which kernel takes which attention, and why not others: one table.

What no kernel takes runs through plain XLA (`fused`), on every device. The limits are what kernels can do, but for
"long", from where on the pattern is no longer formed at once. No speed was measured on a TPU or a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jaxtyping import Array

from mechjax.models.config import Config
from mechjax.models.fused import fits_one_block


@dataclass(frozen=True)
class Asked:
    """What is known of an attention while it is traced.

    Attributes:
        config: The model's.
        dtype: Of queries, keys and values.
        n_pos: How many tokens there are.
        d_head: Width of queries and keys.
        d_value: Width of values.
        causal: Whether the keys are the queries' own tokens, each of which sees those up to it.
        sinks: Whether heads have learned sinks.
        by_hand: Whether arrays lie on a mesh with axes that are not the compiler's: manual or explicit ones.
    """

    config: Config
    dtype: Any
    n_pos: int
    d_head: int
    d_value: int
    causal: bool = True
    sinks: bool = False
    by_hand: bool = False


@dataclass(frozen=True)
class Limit:
    """What a kernel asks, and why."""

    name: str
    why: str
    holds: Callable[[Asked], bool]


@dataclass(frozen=True)
class Kernel:
    """A kernel, the platform that has it, and its limits."""

    platform: str
    limits: tuple[Limit, ...]


EVERY = (
    Limit(
        "causal", "masks are made while compiling, but a cache's free slots are data, and BERT's tokens see all",
        lambda asked: asked.causal,
    ),
    Limit("alibi", "no number is added per key", lambda asked: asked.config.positions != "alibi"),
    Limit(
        "sinks", "cuDNN's has none, and gradients of splash's round to the values' dtype",
        lambda asked: not asked.sinks,
    ),
    Limit(
        "mesh", "inside `shard_map`, and on explicit axes, a kernel would have to say what varies over which",
        lambda asked: not asked.by_hand,
    ),
    Limit(
        "long", "scores of no more than a block are formed at once",
        lambda asked: not fits_one_block(asked.n_pos, asked.n_pos),
    ),
)  # fmt: skip

KERNELS: dict[str, Kernel] = {
    "splash": Kernel("tpu", (
        *EVERY,
        Limit(
            "precision", "it multiplies in bfloat16 passes, float32 too, and knows no float16",
            lambda asked: asked.dtype == jnp.bfloat16
            or (asked.dtype == jnp.float32 and asked.config.precision == "default"),
        ),
    )),
    "cudnn": Kernel("cuda", (
        *EVERY,
        Limit(
            "precision", "it takes bfloat16 and float16 only",
            lambda asked: asked.dtype in (jnp.bfloat16, jnp.float16),
        ),
        Limit("softcap", "it has no soft-cap", lambda asked: asked.config.attn_softcap is None),
        Limit(
            "width", "heads are a multiple of 8 wide, at most 256 (128 before Hopper, where JAX looks at the GPU)",
            lambda asked: asked.d_head % 8 == 0 and asked.d_head <= 256,
        ),
        Limit("values", "values are as wide as keys", lambda asked: asked.d_value == asked.d_head),
    )),
}  # fmt: skip
"""Kernels by name."""


def refused(asked: Asked) -> dict[str, tuple[str, ...]]:
    """For each kernel the names of the limits that keep it from this attention; none where it takes it."""
    return {
        name: tuple(limit.name for limit in kernel.limits if not limit.holds(asked))
        for name, kernel in KERNELS.items()
    }


def kernels_for(asked: Asked) -> tuple[str, ...]:
    """The kernels that take it, each on its platform."""
    return tuple(name for name, limits in refused(asked).items() if not limits)


def placed_by_hand(x: Array) -> bool:
    """Whether an array lies on a mesh with axes that are not the compiler's: manual or explicit ones."""
    kind: Any = jax.typeof(x)
    return any(axis is not AxisType.Auto for axis in kind.sharding.mesh.axis_types)
