"""The structures of models: which class of config describes which class of model. One row each."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mechjax.base.errors import ArgumentError
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.encoder import Encoder, assemble_encoder
from mechjax.models.encoder_config import EncoderConfig
from mechjax.models.mamba import Mamba, assemble_mamba
from mechjax.models.mamba_config import MambaConfig
from mechjax.models.model_config import ModelConfig
from mechjax.models.params import assemble
from mechjax.models.t5 import T5, assemble_t5
from mechjax.models.t5_config import T5Config
from mechjax.models.vit import ViT, assemble_vit
from mechjax.models.vit_config import ViTConfig

Model = Decoder | Encoder | T5 | ViT | Mamba
"""A model of any structure."""


@dataclass(frozen=True)
class Structure:
    """One structure.

    Attributes:
        name: What models of it are called, in words and in the plural.
        config: The class of their configs.
        assemble: A model of a config and its parameters by path.
    """

    name: str
    config: type[ModelConfig]
    assemble: Callable[[Any, Mapping[str, Any]], Any]


STRUCTURES = (
    Structure("decoders", Config, assemble),
    Structure("encoders", EncoderConfig, assemble_encoder),
    Structure("encoder-decoders", T5Config, assemble_t5),
    Structure("vision transformers", ViTConfig, assemble_vit),
    Structure("state space models", MambaConfig, assemble_mamba),
)
"""Every structure."""


def structure_of(config: ModelConfig | type[ModelConfig]) -> Structure:
    """The structure that a config, or a class of configs, describes.

    Raises:
        ArgumentError: A config of no structure.
    """
    kind = config if isinstance(config, type) else type(config)
    for structure in STRUCTURES:
        if structure.config is kind:
            return structure
    known = ", ".join(structure.config.__name__ for structure in STRUCTURES)
    raise ArgumentError(f"A {kind.__name__} describes no model; configs that do are {known}.")


def build(config: ModelConfig, params: Mapping[str, Any]) -> Any:
    """The model that a config describes, of its parameters by path (`config.shapes`)."""
    return structure_of(config).assemble(config, params)
