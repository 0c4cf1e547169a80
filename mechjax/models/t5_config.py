"""What an encoder-decoder is made of: T5's choices (Raffel et al. 2019, arXiv:1910.10683, section 2.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mechjax.base.errors import ArgumentError
from mechjax.models.checked import check_choices, check_count, check_positive
from mechjax.models.model_config import MAX_LAYERS, MAX_PARAMETERS, ModelConfig

_DERIVED: Any = None  # replaced in __post_init__
_FURTHEST = 2**20
"""A longer `max_distance` is refused: each distance up to it has an entry in a table."""
_LEAST_BUCKETS = 4
"""Half of a direction's buckets hold one distance each, and both directions have some."""


@dataclass(frozen=True, kw_only=True)
class T5Config(ModelConfig):
    """The shape and choices of T5; static and hashable. Norms are RMSNorms before each part, and nothing has a bias.

    Attributes, beside those of every model (whose `n_layers` are the encoder's):
        d_vocab: Number of tokens, of both texts.
        n_heads: Number of heads.
        d_head: Width of a head. Default: `d_model // n_heads`.
        d_mlp: Number of neurons of a block. Default: `4 * d_model`.
        n_decoder_layers: Number of the decoder's blocks; 0 for an encoder alone. Default: `n_layers`.
        n_buckets: Number of learned position biases of each head: distances share them, the more the further. Even.
        max_distance: From here on all distances share one; more than a quarter of `n_buckets` for an encoder alone,
            than half of it with a decoder.
        bias_per_layer: Whether each layer has position biases of its own (UMT5), or all layers share one table.
        mlp: "plain" (T5) or "gated" (T5 v1.1, mT5).
        activation: "gelu" (exact), "gelu_new" (tanh), "silu" or "relu".
        tied: Whether the unembedding is the embedding's transpose.
        scaled: Whether what the unembedding reads is multiplied by `d_model**-0.5` (T5, not T5 v1.1).
        start_token: What the decoder's text begins with.

    Raises:
        ArgumentError: A number that is absurd or contradicts another; the message names the field.
    """

    norm: Literal["rms"] = "rms"
    norm_eps: float = 1e-6
    d_vocab: int
    n_heads: int
    d_head: int = _DERIVED
    d_mlp: int = _DERIVED
    n_decoder_layers: int = _DERIVED
    n_buckets: int = 32
    max_distance: int = 128
    bias_per_layer: bool = False
    mlp: Literal["plain", "gated"] = "plain"
    activation: Literal["gelu", "gelu_new", "silu", "relu"] = "relu"
    tied: bool = True
    scaled: bool = True
    start_token: int = 0

    def __post_init__(self) -> None:
        for name in ("d_vocab", "d_model", "n_heads"):
            check_count(name, getattr(self, name))
        check_count("n_layers", self.n_layers, MAX_LAYERS)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ArgumentError(
                f"`d_model` = {self.d_model} is no multiple of `n_heads` = {self.n_heads}: change one or pass `d_head`."
            )
        derived = {
            "d_head": self.d_model // self.n_heads, "d_mlp": 4 * self.d_model, "n_decoder_layers": self.n_layers,
        }  # fmt: skip
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in ("d_head", "d_mlp"):
            check_count(name, getattr(self, name))
        if self.n_decoder_layers != 0 or isinstance(self.n_decoder_layers, bool):
            check_count("n_decoder_layers", self.n_decoder_layers, MAX_LAYERS)
        check_positive("norm_eps", self.norm_eps)
        if self.norm_offset != 0.0:
            raise ArgumentError(f"`norm_offset` = {self.norm_offset!r}: T5 has only 0.0.")
        check_choices(self)
        self._check_buckets()
        self._check_ends()
        if self.n_params > MAX_PARAMETERS:
            raise ArgumentError(
                f"A config of {self.n_params:,} parameters is refused: at most {MAX_PARAMETERS:,} are accepted. "
                f"`d_vocab` = {self.d_vocab}, `d_model` = {self.d_model}, `n_layers` = {self.n_layers}, "
                f"`n_decoder_layers` = {self.n_decoder_layers}, `n_heads` = {self.n_heads}, `d_head` = {self.d_head}, "
                f"`d_mlp` = {self.d_mlp}: which of them is mistaken?"
            )

    def _check_buckets(self) -> None:
        check_count("n_buckets", self.n_buckets, _FURTHEST)
        check_count("max_distance", self.max_distance, _FURTHEST)
        if self.n_buckets % 2 or self.n_buckets < _LEAST_BUCKETS:
            raise ArgumentError(
                f"`n_buckets` = {self.n_buckets} must be even and at least {_LEAST_BUCKETS}: an encoder has half of "
                "them for what comes before and half for what comes after."
            )
        alone = self.n_buckets // (2 if self.n_decoder_layers else 4)
        if self.max_distance <= alone:
            raise ArgumentError(
                f"`max_distance` = {self.max_distance} must be more than {alone}: of `n_buckets` = {self.n_buckets} "
                "so many hold one distance each, and the others share those up to it."
            )

    def _check_ends(self) -> None:
        start = self.start_token
        if not isinstance(start, int) or isinstance(start, bool) or not 0 <= start < self.d_vocab:
            raise ArgumentError(
                f"`start_token` = {start!r} is no token: the model has {self.d_vocab}, 0 to {self.d_vocab - 1}."
            )
        if not self.n_decoder_layers and not self.tied:
            raise ArgumentError(
                "`tied` = False is an unembedding, which an encoder alone (`n_decoder_layers` = 0) does not have: "
                "leave it out."
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter ("encoder.blocks.attn.W_Q"), in forward order."""
        m, h, d, f, v = self.d_model, self.n_heads, self.d_head, self.d_mlp, self.d_vocab
        attention = {"W_Q": (m, h, d), "W_K": (m, h, d), "W_V": (m, h, d), "W_O": (h, d, m)}
        mlp = {"mlp.W_in": (m, f), "mlp.W_gate": (m, f), "mlp.W_out": (f, m)}
        if self.mlp == "plain":
            del mlp["mlp.W_gate"]

        def stack(name: str, n_layers: int, *, cross: bool) -> dict[str, tuple[int, ...]]:
            if not n_layers:
                return {}
            block = {"ln1.w": (m,)} | {f"attn.{path}": shape for path, shape in attention.items()}
            if cross:
                block |= {"ln_cross.w": (m,)} | {f"cross.{path}": shape for path, shape in attention.items()}
            block |= {"ln2.w": (m,)} | mlp
            layers = {f"{name}.blocks.{path}": (n_layers, *shape) for path, shape in block.items()}
            biases = (n_layers,) if self.bias_per_layer else ()
            return {f"{name}.W_rel": (*biases, self.n_buckets, h)} | layers | {f"{name}.ln_final.w": (m,)}

        return (
            {"W_E": (v, m)}
            | stack("encoder", self.n_layers, cross=False)
            | stack("decoder", self.n_decoder_layers, cross=True)
            | ({} if self.tied else {"W_U": (m, v)})
        )

    @property
    def letters(self) -> Mapping[str, int]:
        """The sizes that layouts of weights name (`families/rule.py`)."""
        return {
            "v": self.d_vocab, "m": self.d_model, "h": self.n_heads, "d": self.d_head, "f": self.d_mlp,
            "b": self.n_buckets,
        }  # fmt: skip

    @property
    def n_kv_heads(self) -> int:
        """Number of key and value heads: every head has its own."""
        return self.n_heads

    @property
    def n_texts(self) -> int:
        """How many texts a call of the model reads: the encoder's, and the decoder's where there is one."""
        return 2 if self.n_decoder_layers else 1

    @property
    def depth(self) -> str:
        """How many layers there are, in words."""
        return f"{self.n_layers} layers of the encoder, {self.n_decoder_layers} of the decoder"

    def layers_of(self, path: str) -> tuple[int, ...]:
        """The layers that a parameter of the blocks, or a checkpoint's module of them, stacks."""
        return tuple(range(self.n_decoder_layers if path.startswith("decoder.") else self.n_layers))
