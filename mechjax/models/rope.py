"""Rotary frequencies (Su et al. 2021, arXiv:2104.09864, Eq. 15), and how they are stretched to longer contexts.

Plain: `theta_i = base**(-2i / dim)`. Each way of stretching is a small class that changes these numbers before anything
is compiled. Frequencies that depend on the sequence's length in other ways ("dynamic") are not implemented.
"""

import abc
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mechjax.base.errors import ArgumentError


class Stretch(abc.ABC):
    """How frequencies change for contexts longer than those that the model was first trained on.

    Attributes:
        amplitude: Factor on cosines and sines, so its square is one on the scores of the dimensions that rotate.
    """

    amplitude: float = 1.0

    @abc.abstractmethod
    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """The frequencies in place of the `plain` ones, in float32."""

    def beyond(self, plain: np.ndarray) -> tuple[int, np.ndarray] | None:
        """A length, and the frequencies of sequences that are longer; None where length does not matter."""
        del plain
        return None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if isinstance(number, bool):
                    continue
                if not isinstance(number, (int, float)) or not 0 < number < math.inf:
                    raise ArgumentError(
                        f"`{name}` = {value!r} of {type(self).__name__} must be a positive, finite number."
                    )


@dataclass(frozen=True, kw_only=True)
class Linear(Stretch):
    """Positions divided by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    __no_type_check__: ClassVar[bool] = True

    factor: float

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """All frequencies divided."""
        return plain / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Banded(Stretch):
    """Long wavelengths divided, short ones kept, a ramp between them (Llama 3.1; Grattafiori et al. 2024, 2407.21783).

    Attributes:
        factor: What long wavelengths are divided by.
        low: Wavelengths above `trained / low` are divided whole.
        high: Wavelengths below `trained / high` are kept.
        trained: Length of the contexts of the first training.
    """

    __no_type_check__: ClassVar[bool] = True

    factor: float
    low: float
    high: float
    trained: int

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Interpolated by how often a dimension turns within `trained` positions."""
        turns = self.trained * plain / np.float32(2 * math.pi)
        kept = np.clip((turns - np.float32(self.low)) / np.float32(self.high - self.low), 0, 1)
        return kept * plain + (1 - kept) * plain / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class Yarn(Stretch):
    """YaRN (Peng et al. 2023, arXiv:2309.00071): a ramp over dimensions, and sharper attention.

    Attributes:
        factor: What the slowest dimensions are divided by.
        trained: Length of the contexts of the first training.
        fast: Dimensions that turn more often than this within `trained` positions are kept.
        slow: Those that turn more seldom are divided whole.
        truncate: Whether the ramp begins and ends at whole dimensions.
        amplitude: Factor on cosines and sines.
    """

    __no_type_check__: ClassVar[bool] = True

    factor: float
    trained: int
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    amplitude: float = 1.0

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Interpolated along a ramp over dimensions."""
        dim = 2 * len(plain)

        # The dimension that turns so often within `trained` positions.
        low, high = (
            dim * math.log(self.trained / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.fast, self.slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0  # no division by zero
        ramp = np.clip(
            (np.arange(len(plain), dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1
        )
        return (1 - ramp) * plain + ramp * plain / np.float32(self.factor)


@dataclass(frozen=True, kw_only=True)
class LongRope(Stretch):
    """A divisor for each dimension, one set for short and one for long sequences (Ding et al. 2024, arXiv:2402.13753).

    Which set is used depends on the sequence: numbers at early positions change when a sequence outgrows `trained`.

    Attributes:
        short: Divisors for sequences up to `trained` positions.
        long: Divisors for longer ones.
        trained: Length of the contexts of the first training.
        amplitude: Factor on cosines and sines.
    """

    __no_type_check__: ClassVar[bool] = True

    short: tuple[float, ...]
    long: tuple[float, ...]
    trained: int
    amplitude: float = 1.0

    def frequencies(self, plain: np.ndarray, base: float) -> np.ndarray:
        """Those of short sequences."""
        return plain / np.array(self.short, np.float32)

    def beyond(self, plain: np.ndarray) -> tuple[int, np.ndarray] | None:
        """`trained`, and the frequencies of longer sequences."""
        return self.trained, plain / np.array(self.long, np.float32)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """How a layer's angles are made.

    Attributes:
        base: Base of the wavelengths.
        stretch: How they are stretched; None for not at all.
    """

    __no_type_check__: ClassVar[bool] = True

    base: float = 10000.0
    stretch: Stretch | None = None

    def frequencies(self, dim: int) -> np.ndarray:
        """Radians per position of each of the `dim / 2` rotating pairs, in float32."""
        plain = self._plain(dim)
        return plain if self.stretch is None else self.stretch.frequencies(plain, self.base)

    def beyond(self, dim: int) -> tuple[int, np.ndarray] | None:
        """A length, and the frequencies of longer sequences; None where length does not matter."""
        return None if self.stretch is None else self.stretch.beyond(self._plain(dim))

    @property
    def amplitude(self) -> float:
        """Factor on cosines and sines."""
        return 1.0 if self.stretch is None else self.stretch.amplitude

    def check(self, dim: int) -> None:
        """Refuse numbers that cannot be used on `dim` rotating dimensions.

        Raises:
            ArgumentError: The message names the number.
        """
        if (
            isinstance(self.base, bool)
            or not isinstance(self.base, (int, float))
            or not 0 < self.base < math.inf
        ):
            raise ArgumentError(f"`base` = {self.base!r} of Rope must be a positive, finite number.")
        if self.stretch is not None and not isinstance(self.stretch, Stretch):
            raise ArgumentError(
                f"`stretch` = {self.stretch!r} of Rope must be a Stretch, such as `Linear(factor=8)`."
            )
        for name in ("short", "long"):
            if (divisors := getattr(self.stretch, name, None)) is not None and len(divisors) != dim // 2:
                raise ArgumentError(
                    f"`{name}` of LongRope has {len(divisors)} divisors; {dim} dimensions rotate, so {dim // 2} are "
                    "needed."
                )

    def _plain(self, dim: int) -> np.ndarray:
        exponent: Any = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        return np.float32(1) / np.float32(self.base) ** exponent
