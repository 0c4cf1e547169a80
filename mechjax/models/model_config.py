"""What every model's config says, whatever its structure."""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

MAX_LAYERS = 2**16
"""More layers than this are refused: a config that asks for them is hostile or mistaken."""
MAX_PARAMETERS = 2**40
"""So are more parameters."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig(abc.ABC):
    """Width, layers, norms, precision and origin; static and hashable. Each structure adds its own choices.

    Attributes:
        d_model: Width of the residual stream.
        n_layers: Number of blocks.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: What the norms add to the variance.
        norm_offset: Added to the norms' scales; 1.0 where a checkpoint keeps them as differences from one.
        precision: "highest" (float32 contractions in full float32) or "default" (whatever is fast on the device, a
            TPU's attention kernel among it).
        source: The family whose checkpoint this was read from, whose modules' paths then name sites too; None for none.
    """

    __no_type_check__: ClassVar[bool] = True  # configs check themselves, with better messages, for users too
    reads_pixels: ClassVar[bool] = False
    """Whether models are called with images, not with tokens."""

    d_model: int
    n_layers: int
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    precision: Literal["highest", "default"] = "highest"
    source: str | None = None

    @property
    @abc.abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter, in forward order."""

    @property
    @abc.abstractmethod
    def letters(self) -> Mapping[str, int]:
        """The sizes that layouts of weights name (`families/rule.py`)."""

    @property
    def apart(self) -> Mapping[str, int]:
        """What may have a tensor each in a checkpoint, such as "expert", and how many there are."""
        return {}

    def layers_of(self, path: str) -> tuple[int, ...]:
        """The layers that a parameter of the blocks stacks."""
        return tuple(range(self.n_layers))

    @property
    def n_texts(self) -> int:
        """How many texts a call of the model reads."""
        return 1

    def inputs(self, batch: int, n_pos: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes and dtypes of what a model is called with: as many prompts, and tokens of each, of every text."""
        return (jax.ShapeDtypeStruct((batch, n_pos), jnp.int32),) * self.n_texts

    @property
    def depth(self) -> str:
        """How many layers there are, in words."""
        return f"{self.n_layers} layers"

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes.values()))
