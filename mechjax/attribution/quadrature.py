"""Rules of quadrature between 0 and 1: where an integral over a way is read, and with which weights."""

from typing import Literal, get_args

from mechjax.base.errors import ArgumentError

Quadrature = Literal["midpoint", "left", "right", "trapezoid"]
"""Where in each interval a rule reads: "trapezoid" at both ends, so once more than there are steps."""


def nodes_of(quadrature: str, steps: int) -> list[tuple[float, float]]:
    """Where between 0 and 1 a rule reads, and the weights of what it reads.

    Raises:
        ArgumentError: Less than one step, or an unknown rule.
    """
    if steps < 1:
        raise ArgumentError(f"steps={steps}: the way from ablated to clean needs at least one step.")
    if quadrature not in get_args(Quadrature):
        known = ", ".join(map(repr, get_args(Quadrature)))
        raise ArgumentError(f"quadrature={quadrature!r}: expected one of {known}.")
    if quadrature == "trapezoid":
        return [(k / steps, (0.5 if k in (0, steps) else 1.0) / steps) for k in range(steps + 1)]
    shift = {"left": 0.0, "midpoint": 0.5, "right": 1.0}[quadrature]
    return [((k + shift) / steps, 1 / steps) for k in range(steps)]
