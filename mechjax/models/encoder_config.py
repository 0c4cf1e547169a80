"""What an encoder is made of: a decoder's choices, and its heads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mechjax.base.errors import ArgumentError
from mechjax.models.config import Config

N_RELATIONS = 2
"""Answers of the next-sentence head: the second text follows the first, or does not."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Config):
    """The shape and choices of an encoder; static and hashable.

    Norms stand on the stream itself, after every sum, so the decoder's `norms` says nothing here. Of its other choices
    an encoder has learned positions, a plain MLP, biases and full attention; what else is asked for is refused.

    Attributes:
        n_types: Number of token types (which of two texts a token belongs to).
        mlm: Whether it predicts masked tokens.
        pooler: Whether it has a summary of the first token.
        nsp: Whether it predicts from that whether the second text follows the first.
        head_activation: Nonlinearity of the head that predicts masked tokens.

    Raises:
        ArgumentError: A number that is absurd, or a choice that encoders do not have; the message names the field.
    """

    n_types: int = 2
    mlm: bool = True
    pooler: bool = False
    nsp: bool = False
    head_activation: Literal["gelu", "gelu_new", "silu", "relu"] = "gelu"

    def __post_init__(self) -> None:
        if not isinstance(self.n_types, int) or not 1 <= self.n_types < 2**31:
            raise ArgumentError(
                f"`n_types` = {self.n_types!r} must be a whole number from 1 to {2**31 - 1:,}."
            )
        super().__post_init__()
        if self.nsp and not self.pooler:
            raise ArgumentError("`nsp` = True reads the pooled output, so it needs `pooler` = True.")
        fixed = {
            "norm": "layer", "norm_weight": True, "norm_bias": True, "positions": "learned", "residual": "serial",
            "mlp": "plain", "qkv_bias": True, "out_bias": True, "mlp_bias": True, "windows": None, "qk_norm": "none",
            "n_kv_heads": self.n_heads, "embed_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0,
            "final_softcap": None,
        }  # fmt: skip
        if not isinstance(self.tied, bool):
            raise ArgumentError(f"`tied` = {self.tied!r} must be True or False.")
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise ArgumentError(f"`{name}` = {getattr(self, name)!r}: an encoder has only {only!r}.")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter, in forward order."""
        m, h, d, f, v = self.d_model, self.n_heads, self.d_head, self.d_mlp, self.d_vocab

        def norm(path: str) -> dict[str, tuple[int, ...]]:
            return {f"{path}.w": (m,), f"{path}.b": (m,)}

        first = {"W_E": (v, m), "W_pos": (self.n_ctx + self.position_offset, m), "W_type": (self.n_types, m)}
        block = {
            "attn.W_Q": (m, h, d), "attn.W_K": (m, h, d), "attn.W_V": (m, h, d), "attn.W_O": (h, d, m),
            "attn.b_Q": (h, d), "attn.b_K": (h, d), "attn.b_V": (h, d), "attn.b_O": (m,), **norm("ln1"),
            "mlp.W_in": (m, f), "mlp.W_out": (f, m), "mlp.b_in": (f,), "mlp.b_out": (m,), **norm("ln2"),
        }  # fmt: skip
        layers = {f"blocks.{path}": (self.n_layers, *shape) for path, shape in block.items()}
        head = {"W_head": (m, m), "b_head": (m,), **norm("ln_final"), "W_U": (m, v), "b_U": (v,)}
        if self.tied:
            del head["W_U"]
        pool = {"W_pool": (m, m), "b_pool": (m,)}
        nsp = {"W_nsp": (m, N_RELATIONS), "b_nsp": (N_RELATIONS,)}
        return (
            first | norm("ln_embed") | layers
            | (head if self.mlm else {}) | (pool if self.pooler else {}) | (nsp if self.nsp else {})
        )  # fmt: skip

    @property
    def letters(self) -> Mapping[str, int]:
        """The sizes that layouts of weights name (`families/rule.py`)."""
        return {**super().letters, "t": self.n_types, "o": self.d_model, "c": N_RELATIONS}
