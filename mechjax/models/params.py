"""A decoder from its parameters, addressed by path ("blocks.attn.W_Q"), and back."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from mechjax.models.attention import Attention
from mechjax.models.block import Block
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.mlp import MLP
from mechjax.models.norms import Norm


def assemble(config: Config, params: Mapping[str, Any]) -> Decoder:
    """A decoder that holds `params`, whose paths and shapes are those of `config.shapes`."""

    def build(module: type[eqx.Module], prefix: str) -> Any:
        names = module.__dataclass_fields__
        return module(**{name: params.get(f"{prefix}.{name}") for name in names})

    block = Block(
        ln1=build(Norm, "blocks.ln1"), attn=build(Attention, "blocks.attn"),
        ln2=None if config.mlp == "none" else build(Norm, "blocks.ln2"),
        mlp=None if config.mlp == "none" else build(MLP, "blocks.mlp"),
    )  # fmt: skip
    return Decoder(
        W_E=params["W_E"], W_pos=params.get("W_pos"), blocks=block, ln_final=build(Norm, "ln_final"),
        W_U=params.get("W_U"), b_U=params.get("b_U"), config=config,
    )  # fmt: skip


def parameters(model: Decoder) -> dict[str, Array]:
    """Every parameter by path; the inverse of `assemble`."""
    leaves = jax.tree_util.tree_flatten_with_path(model)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
