"""A decoder from its parameters, addressed by path ("blocks.attn.W_Q"), and back."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax

from mechjax.models.attention import Attention
from mechjax.models.block import Block
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder
from mechjax.models.mla import MLA
from mechjax.models.mlp import MLP
from mechjax.models.moe import MoE
from mechjax.models.norms import Norm
from mechjax.models.quantized import is_quantized
from mechjax.models.shapes import norm_places


def assemble(config: Config, params: Mapping[str, Any]) -> Decoder:
    """A decoder that holds `params`, whose paths and shapes are those of `config.shapes`."""
    norms = norm_places(config)

    def build(module: type[eqx.Module], prefix: str, **parts: Any) -> Any:
        names = module.__dataclass_fields__.keys() - parts
        return module(**{name: params.get(f"{prefix}.{name}") for name in names}, **parts)

    def norm(path: str) -> Norm | None:
        return build(Norm, path) if path in norms else None

    block = Block(
        ln1=norm("blocks.ln1"),
        attn=build(MLA, "blocks.attn")
        if config.latent
        else build(
            Attention, "blocks.attn", q_norm=norm("blocks.attn.q_norm"), k_norm=norm("blocks.attn.k_norm")
        ),
        ln1_post=norm("blocks.ln1_post"),
        ln2=norm("blocks.ln2"),
        mlp=build(MLP, "blocks.mlp") if config.mlp_layers else None,
        moe=build(
            MoE, "blocks.moe", shared=build(MLP, "blocks.moe.shared") if config.experts.d_shared else None
        )
        if config.experts
        else None,
        ln2_post=norm("blocks.ln2_post"),
    )
    return Decoder(
        W_E=params["W_E"], W_pos=params.get("W_pos"), ln_embed=norm("ln_embed"), blocks=block,
        ln_final=norm("ln_final"), W_U=params.get("W_U"), b_U=params.get("b_U"), config=config,
    )  # fmt: skip


def parameters(model: eqx.Module) -> dict[str, Any]:
    """Every parameter (or its shape, of a model of shapes) by path; the inverse of `assemble`, and of an encoder's.

    A matrix in few bits is one parameter, a `Quantized`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(model, is_leaf=is_quantized)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
