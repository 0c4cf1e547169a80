"""Where a compiled model keeps each sequence: directions of the residual stream, orthonormal, shared by no two."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Variable:
    """One sequence of a program in the residual stream.

    Attributes:
        name: What the program calls it.
        start: The first of its directions.
        values: What each direction stands for; empty where it is numerical.
        numerical: Whether it is one direction, as long as its value.
    """

    name: str
    start: int
    values: tuple[Any, ...]
    numerical: bool

    @property
    def size(self) -> int:
        """How many directions it has."""
        return 1 if self.numerical else len(self.values)

    @property
    def stop(self) -> int:
        """The direction after its last."""
        return self.start + self.size

    def encode(self, value: Any) -> Float[np.ndarray, " size"]:
        """`value` in its own directions."""
        if self.numerical:
            return np.array([value], float)
        return np.eye(self.size)[self.values.index(value)]

    def decode(self, x: Float[np.ndarray, " size"]) -> Any:
        """The value that coordinates along its directions stand for, or are nearest to."""
        return float(x[0]) if self.numerical else self.values[int(np.argmax(x))]
