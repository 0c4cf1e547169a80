"""What transformers are trained with: AdamW (Loshchilov and Hutter 2019, 1711.05101) or Muon, warm-up, cosine."""

from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers

from mechjax.base.errors import ArgumentError


def adamw(
    peak: float, *, steps: int, warm_up: int, weight_decay: float = 0.1, clip: float = 1.0, b2: float = 0.98
) -> optax.GradientTransformation:
    """AdamW under a linear warm-up to `peak` and a cosine down to 2 % of it, gradients clipped by their global norm.

    Weights decay where a field's name begins with `W`; biases and the scales of norms do not.

    Args:
        peak: Highest learning rate.
        steps: Length of the whole schedule.
        warm_up: Steps until the peak.
        weight_decay: Per unit of learning rate.
        clip: Greatest global norm of a gradient.
        b2: Memory of the second moment.

    Raises:
        ArgumentError: A warm-up that is not shorter than the schedule.
    """
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(_schedule(peak, steps, warm_up), b2=b2, weight_decay=weight_decay, mask=_weights),
    )


def muon(
    peak: float, *, steps: int, warm_up: int, weight_decay: float, clip: float = 1.0, b2: float = 0.98
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the matrices of a decoder's blocks, Adam for the rest; a schedule as `adamw`'s.

    Only those matrices decay. Arguments and errors as of `adamw`.
    """
    reads, writes = MuonDimensionNumbers((1,), (2, 3)), MuonDimensionNumbers((1, 2), (3,))
    plain = MuonDimensionNumbers((1,), (2,))
    matrices = {"W_Q": reads, "W_K": reads, "W_V": reads, "W_O": writes, "W_in": plain, "W_out": plain}

    def shapes(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: matrices.get(path[-1].name), params)

    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.contrib.muon(
            _schedule(peak, steps, warm_up), adam_b2=b2, weight_decay=weight_decay, adam_weight_decay=0.0,
            consistent_rms=0.2, muon_weight_dimension_numbers=shapes,
        ),
    )  # fmt: skip


def _schedule(peak: float, steps: int, warm_up: int) -> optax.Schedule:
    if not 0 <= warm_up < steps:
        raise ArgumentError(
            f"warm_up={warm_up} of steps={steps}: the warm-up must be 0 or more and end before the run."
        )
    return optax.warmup_cosine_decay_schedule(0.0 if warm_up else peak, peak, warm_up, steps, 0.02 * peak)


def _weights(params: PyTree) -> PyTree:
    """True at the leaves whose field is called `W...`."""
    name: Any = lambda path: getattr(path[-1], "name", getattr(path[-1], "key", "")) if path else ""
    return jax.tree_util.tree_map_with_path(lambda path, _: str(name(path)).startswith("W"), params)
