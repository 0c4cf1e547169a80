"""What a decoder is made of: orthogonal choices, no family names."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin

from mechjax.base.errors import ArgumentError
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent

MAX_PARAMETERS = 2**40
"""More parameters than this are refused: a config that asks for them is hostile or mistaken."""
MAX_LAYERS = 2**16
"""So are more layers."""

_DERIVED: Any = None  # replaced in __post_init__


@dataclass(frozen=True, kw_only=True)
class Config:
    """The shape and choices of a decoder; static and hashable.

    Attributes:
        d_vocab: Number of tokens.
        n_ctx: Longest sequence that the model was made for; a limit where positions are learned.
        d_model: Width of the residual stream.
        n_layers: Number of blocks.
        n_heads: Number of query heads.
        n_kv_heads: Number of key and value heads; divides `n_heads`. Default: `n_heads`.
        d_head: Width of a head. Default: `d_model // n_heads`.
        d_mlp: Number of neurons of a block. Default: `4 * d_model`.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_eps: What the norms add to the variance.
        positions: "learned", "rotary" or "none".
        rotary_dim: How many dimensions of a head rotate; even. Default: `d_head`.
        rotary_base: Base of the rotation's wavelengths.
        rotary_layout: Which dimensions rotate together: "halves" (i with i + rotary_dim/2) or "pairs" (2i with 2i + 1).
        residual: "serial" (the MLP reads what attention wrote) or "parallel" (both read the block's input).
        mlp: "plain", "gated" or "none" (attention only: blocks without MLP and without its norm).
        activation: "gelu" (exact), "gelu_new" (tanh), "silu" or "relu".
        qkv_bias, out_bias, mlp_bias, unembed_bias: Whether these projections have biases.
        norm_bias: Whether the norms have biases. Default: exactly LayerNorms do.
        tied: Whether the unembedding is the embedding's transpose.
        attn_softcap, final_softcap: c of c * tanh(x / c) on attention scores and logits; None for neither.
        windows: For each layer how many positions a query sees, itself included; None sees all.
        attn_scale: Factor on the scores. Default: `d_head**-0.5`.
        experts: The mixture of experts that takes the MLP's place, in all layers or some; None for none.
        latent: The widths of latent attention; None for ordinary attention.
        precision: "highest" (float32 contractions in full float32) or "default" (whatever is fast on the device).

    Raises:
        ArgumentError: A number that is absurd or contradicts another; the message names the field.
    """

    __no_type_check__: ClassVar[bool] = True  # checks itself, with better messages, for users too

    d_vocab: int
    n_ctx: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int = _DERIVED
    d_head: int = _DERIVED
    d_mlp: int = _DERIVED
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    positions: Literal["learned", "rotary", "none"] = "learned"
    rotary_dim: int = _DERIVED
    rotary_base: float = 10000.0
    rotary_layout: Literal["halves", "pairs"] = "halves"
    residual: Literal["serial", "parallel"] = "serial"
    mlp: Literal["plain", "gated", "none"] = "plain"
    activation: Literal["gelu", "gelu_new", "silu", "relu"] = "gelu_new"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    unembed_bias: bool = False
    norm_bias: bool = _DERIVED
    tied: bool = True
    attn_softcap: float | None = None
    final_softcap: float | None = None
    windows: tuple[int | None, ...] | None = None
    attn_scale: float = _DERIVED
    experts: Experts | None = None
    latent: Latent | None = None
    precision: Literal["highest", "default"] = "highest"

    def __post_init__(self) -> None:
        for name in ("d_vocab", "n_ctx", "d_model", "n_heads"):
            _check_count(name, getattr(self, name))
        _check_count("n_layers", self.n_layers, MAX_LAYERS)
        self._default("n_kv_heads", self.n_heads)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ArgumentError(
                f"`d_model` = {self.d_model} is no multiple of `n_heads` = {self.n_heads}: change one or pass `d_head`."
            )
        self._default("d_head", self.d_model // self.n_heads)
        self._default("d_mlp", 4 * self.d_model)
        self._default("norm_bias", self.norm == "layer")
        for name in ("n_kv_heads", "d_head", "d_mlp"):
            _check_count(name, getattr(self, name))
        self._default("rotary_dim", self.d_head)
        self._default("attn_scale", self.d_head**-0.5)
        if isinstance(self.windows, list):
            object.__setattr__(self, "windows", tuple(self.windows))
        self._check_choices()
        self._check_numbers()

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        for name, hint in type(self).__annotations__.items():
            value = getattr(self, name)
            if get_origin(hint) is Literal and value not in list(get_args(hint)):
                raise ArgumentError(
                    f"`{name}` = {value!r} is not one of {', '.join(map(repr, get_args(hint)))}."
                )
            if hint is bool and not isinstance(value, bool):
                raise ArgumentError(f"`{name}` = {value!r} must be True or False.")

    def _check_numbers(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ArgumentError(
                f"`n_heads` = {self.n_heads} is no multiple of `n_kv_heads` = {self.n_kv_heads}: "
                "every key head serves the same number of query heads."
            )
        if self.positions == "rotary":
            _check_count("rotary_dim", self.rotary_dim)
            if self.rotary_dim % 2 or self.rotary_dim > self.d_head:
                raise ArgumentError(
                    f"`rotary_dim` = {self.rotary_dim} must be even and at most `d_head` = {self.d_head}: "
                    "dimensions of a head rotate two by two."
                )
        for name in ("norm_eps", "rotary_base", "attn_scale", "attn_softcap", "final_softcap"):
            value = getattr(self, name)
            if value is None and name.endswith("softcap"):
                continue
            if not _is_positive(value):
                raise ArgumentError(f"`{name}` = {value!r} must be a positive, finite number.")
        if self.windows is not None:
            if not isinstance(self.windows, tuple) or len(self.windows) != self.n_layers:
                raise ArgumentError(
                    f"`windows` = {self.windows!r} must have one entry for each of the {self.n_layers} layers: "
                    "a number of positions, or None for a layer that sees all."
                )
            for window in self.windows:
                if window is not None:
                    _check_count("windows", window)
        if self.n_params > MAX_PARAMETERS:
            raise ArgumentError(
                f"A config of {self.n_params:,} parameters is refused: at most {MAX_PARAMETERS:,} are accepted. "
                f"`d_vocab` = {self.d_vocab}, `n_ctx` = {self.n_ctx}, `d_model` = {self.d_model}, "
                f"`n_layers` = {self.n_layers}, `n_heads` = {self.n_heads}, `d_head` = {self.d_head}, "
                f"`d_mlp` = {self.d_mlp}: which of them is mistaken?"
            )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter ("blocks.attn.W_Q": (layer, d_model, head, d_head)), in forward order."""
        m, h, n, d, f, v = self.d_model, self.n_heads, self.n_kv_heads, self.d_head, self.d_mlp, self.d_vocab
        mlp, gated = self.mlp != "none", self.mlp == "gated"
        has = {
            "W_pos": self.positions == "learned", "ln1.b": self.norm_bias, "ln_final.b": self.norm_bias,
            "attn.b_Q": self.qkv_bias, "attn.b_K": self.qkv_bias, "attn.b_V": self.qkv_bias, "attn.b_O": self.out_bias,
            "ln2.w": mlp, "ln2.b": mlp and self.norm_bias, "mlp.W_in": mlp, "mlp.W_gate": gated, "mlp.W_out": mlp,
            "mlp.b_in": mlp and self.mlp_bias, "mlp.b_gate": gated and self.mlp_bias,
            "mlp.b_out": mlp and self.mlp_bias, "W_U": not self.tied, "b_U": self.unembed_bias,
        }  # fmt: skip
        block = {
            "ln1.w": (m,), "ln1.b": (m,),
            "attn.W_Q": (m, h, d), "attn.W_K": (m, n, d), "attn.W_V": (m, n, d), "attn.W_O": (h, d, m),
            "attn.b_Q": (h, d), "attn.b_K": (n, d), "attn.b_V": (n, d), "attn.b_O": (m,),
            "ln2.w": (m,), "ln2.b": (m,),
            "mlp.W_in": (m, f), "mlp.W_gate": (m, f), "mlp.W_out": (f, m),
            "mlp.b_in": (f,), "mlp.b_gate": (f,), "mlp.b_out": (m,),
        }  # fmt: skip
        layers = {
            f"blocks.{path}": (self.n_layers, *shape) for path, shape in block.items() if has.get(path, True)
        }
        first = {"W_E": (v, m), "W_pos": (self.n_ctx, m)}
        last = {"ln_final.w": (m,), "ln_final.b": (m,), "W_U": (m, v), "b_U": (v,)}
        return {path: shape for path, shape in (first | layers | last).items() if has.get(path, True)}

    @property
    def n_params(self) -> int:
        """Number of parameters."""
        return sum(map(math.prod, self.shapes.values()))


def _is_positive(value: Any) -> bool:
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    )


def _check_count(name: str, value: Any, most: int = 2**31 - 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ArgumentError(f"`{name}` = {value!r} must be a whole number from 1 to {most:,}.")
