"""Things to look into: a decoder whose every activation is a named site, its config, and how it starts."""

import importlib
from typing import Any

from mechjax.models.cache import Cache as Cache
from mechjax.models.config import Config as Config
from mechjax.models.decoder import Decoder as Decoder
from mechjax.models.encoder import Encoded as Encoded
from mechjax.models.encoder import Encoder as Encoder
from mechjax.models.encoder_config import EncoderConfig as EncoderConfig
from mechjax.models.factored import FactoredMatrix as FactoredMatrix
from mechjax.models.factored import composition as composition
from mechjax.models.factored import composition_scores as composition_scores
from mechjax.models.factored import copying_score as copying_score
from mechjax.models.factored import ov as ov
from mechjax.models.factored import qk as qk
from mechjax.models.init import init as init
from mechjax.models.model_config import ModelConfig as ModelConfig
from mechjax.models.params import assemble as assemble
from mechjax.models.params import parameters as parameters
from mechjax.models.quantized import Quantized as Quantized
from mechjax.models.resume import resume as resume
from mechjax.models.rewrite import center_unembed as center_unembed
from mechjax.models.rewrite import center_writing as center_writing
from mechjax.models.rewrite import dequantize as dequantize
from mechjax.models.rewrite import fold_norm as fold_norm
from mechjax.models.rewrite import fold_value_bias as fold_value_bias
from mechjax.models.rewrite import quantize as quantize
from mechjax.models.rewrite import refactor_qk_ov as refactor_qk_ov
from mechjax.models.rewrite import ungroup_kv as ungroup_kv
from mechjax.models.steps import at_steps as at_steps

_LAZY = {
    "Mamba": "mechjax.models.mamba",
    "MambaConfig": "mechjax.models.mamba_config",
    "Model": "mechjax.models.structures",
    "Seen": "mechjax.models.vit",
    "StateCache": "mechjax.models.state_cache",
    "T5": "mechjax.models.t5",
    "T5Config": "mechjax.models.t5_config",
    "ViT": "mechjax.models.vit",
    "ViTConfig": "mechjax.models.vit_config",
}


def __getattr__(name: str) -> Any:
    """Import structures that are no decoder on first use."""
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'mechjax.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
