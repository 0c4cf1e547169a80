"""The families that mechjax knows, and which of them a config belongs to."""

from collections.abc import Mapping
from typing import Any, Literal

from mechjax.base.errors import UnsupportedModelError, did_you_mean
from mechjax.models.config import Config
from mechjax.models.families.bert import ENCODERS
from mechjax.models.families.bloom import BLOOM, FALCON
from mechjax.models.families.cohere import COHERE, COHERE2
from mechjax.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from mechjax.models.families.family import Family, read_config, write_config
from mechjax.models.families.gemma import GEMMA, GEMMA2, GEMMA3
from mechjax.models.families.gpt2 import GPT2
from mechjax.models.families.gptj import GPTJ, NEO
from mechjax.models.families.llama import GRANITE, LLAMA, MISTRAL
from mechjax.models.families.mamba import MAMBAS
from mechjax.models.families.moe import GPT_OSS, MIXTRAL, OLMOE, QWEN3_MOE
from mechjax.models.families.native import NATIVE
from mechjax.models.families.neox import NEOX
from mechjax.models.families.olmo import OLMO, OLMO2, OLMO3
from mechjax.models.families.opt import OPT
from mechjax.models.families.phi import PHI, PHI3
from mechjax.models.families.qwen import QWEN2, QWEN3
from mechjax.models.families.stablelm import STABLELM
from mechjax.models.families.t5 import ENCODER_DECODERS
from mechjax.models.families.vit import VISION

FAMILIES: tuple[Family, ...] = (
    GPT2, LLAMA, MISTRAL, NEOX, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, NEO, GPTJ, PHI, PHI3, OLMO, OLMO2, OLMO3, STABLELM,
    COHERE, COHERE2, GRANITE, FALCON, BLOOM, OPT, MIXTRAL, QWEN3_MOE, OLMOE, GPT_OSS, DEEPSEEK_V2, DEEPSEEK_V3,
)  # fmt: skip
"""Every family of decoders, in the order in which an export tries them."""
OTHERS: tuple[Family, ...] = (*ENCODERS, *ENCODER_DECODERS, *VISION, *MAMBAS)
"""Every family of other structures."""
EVERY: tuple[Family, ...] = (*FAMILIES, NATIVE, *OTHERS)
"""Every family."""


def config_from_hf(
    hf: Mapping[str, Any], *, precision: Literal["highest", "default"] = "highest"
) -> tuple[Any, Family]:
    """Our config and the family of a Hugging Face config (the contents of config.json).

    Raises:
        UnsupportedModelError: An architecture or a key that is not known, named.
        ArgumentError: A number that is absurd, named.
    """
    family = _family(hf)
    return read_config(hf, family, precision=precision), family


def config_to_hf(config: Config) -> tuple[dict[str, Any], Family]:
    """A Hugging Face config that reads back as `config`, and its family: the one it came from, where that can.

    Raises:
        UnsupportedModelError: No family can express the config; for each, the fields that it cannot are named.
    """
    refusals = []
    for family in sorted(FAMILIES, key=lambda family: family.name != config.source):
        try:
            return write_config(config, family), family
        except UnsupportedModelError as refusal:
            refusals.append(str(refusal))
    raise UnsupportedModelError("No Hugging Face architecture that mechjax knows fits. " + " ".join(refusals))


def _family(hf: Mapping[str, Any]) -> Family:
    names = hf.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnsupportedModelError(
            f"The config has `architectures` = {names!r}; it must be a list of class names."
        )
    for family in EVERY:
        if set(family.architectures) & set(names) or (
            not names and family not in OTHERS and hf.get("model_type") == family.model_type
        ):
            return family
    asked = ", ".join(names) or str(hf.get("model_type"))
    known = [name for family in (*FAMILIES, *OTHERS) for name in family.architectures]
    raise UnsupportedModelError(
        f"The architecture {asked} is not implemented; known are {', '.join(known)}.{did_you_mean(asked, known)}"
    )
