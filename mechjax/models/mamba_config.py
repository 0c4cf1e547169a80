"""What a Mamba is made of: the choices of its mixer, and what every model says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mechjax.base.errors import ArgumentError
from mechjax.models.checked import check_choices, check_count, check_positive
from mechjax.models.model_config import MAX_LAYERS, MAX_PARAMETERS, ModelConfig

_DERIVED: Any = None  # replaced in __post_init__
_OF_MAMBA, _OF_MAMBA2 = ("dt_rank",), ("n_heads", "d_head", "n_groups")


@dataclass(frozen=True, kw_only=True)
class MambaConfig(ModelConfig):
    """The shape and choices of a Mamba or Mamba-2; static and hashable. Norms are RMSNorms on what the mixers read.

    Attributes, beside those of every model:
        d_vocab: Number of tokens.
        mixer: "mamba" (every channel has states and a rate of its own) or "mamba2" (heads, each with one rate).
        d_inner: Number of channels. Default: `2 * d_model`.
        d_state: Numbers that each channel keeps of the past. Default: 16; of Mamba-2, 128.
        d_conv: How many tokens the convolution sees, the current one included.
        dt_rank: Rank of the map from channels to their rates, in Mamba. Default: `d_model / 16`, rounded up.
        d_head: Channels of a head, in Mamba-2. Default: 64, or all where there are fewer.
        n_heads: Number of heads, in Mamba-2. Default: `d_inner // d_head`.
        n_groups: Heads of a group share B and C, in Mamba-2. Default: 1.
        activation: Nonlinearity after the convolution: "silu", "gelu" (exact), "gelu_new" (tanh) or "relu".
        conv_bias, proj_bias: Whether the convolution and the projections in and out have biases.
        mixer_norm_eps: What the norms on the rates' latent, on B and on C add to the mean square (Falcon Mamba); None
            for no such norms.
        dt_limit: Rates are clipped to these, in Mamba-2.
        residual_float32: Whether the residual stream is float32 whatever the parameters are.
        tied: Whether the unembedding is the embedding's transpose.

    Raises:
        ArgumentError: A number that is absurd or contradicts another; the message names the field.
    """

    norm: Literal["layer", "rms"] = "rms"
    d_vocab: int
    mixer: Literal["mamba", "mamba2"] = "mamba"
    d_inner: int = _DERIVED
    d_state: int = _DERIVED
    d_conv: int = 4
    dt_rank: int = _DERIVED
    d_head: int = _DERIVED
    n_heads: int = _DERIVED
    n_groups: int = _DERIVED
    activation: Literal["silu", "gelu", "gelu_new", "relu"] = "silu"
    conv_bias: bool = True
    proj_bias: bool = False
    mixer_norm_eps: float | None = None
    dt_limit: tuple[float, float] = (0.0, math.inf)
    residual_float32: bool = True
    tied: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("d_vocab", "d_model", "d_conv"):
            check_count(name, getattr(self, name))
        check_count("n_layers", self.n_layers, MAX_LAYERS)
        for name in _OF_MAMBA if self.in_heads else _OF_MAMBA2:
            if getattr(self, name) is not None:
                raise ArgumentError(
                    f"`{name}` = {getattr(self, name)!r}: a {self.mixer} has none, leave it out."
                )
        self._derive("d_inner", 2 * self.d_model)
        self._derive("d_state", 128 if self.in_heads else 16)
        if self.in_heads:
            self._derive("d_head", min(64, self.d_inner))
            self._derive("n_heads", self.d_inner // self.d_head)
            self._derive("n_groups", 1)
        else:
            self._derive("dt_rank", math.ceil(self.d_model / 16))
        if isinstance(self.dt_limit, list):
            object.__setattr__(self, "dt_limit", tuple(self.dt_limit))
        self._check_numbers()

    def _derive(self, name: str, value: int) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)
        check_count(name, getattr(self, name))

    def _check_numbers(self) -> None:
        check_positive("norm_eps", self.norm_eps)
        if self.mixer_norm_eps is not None:
            check_positive("mixer_norm_eps", self.mixer_norm_eps)
        fixed: dict[str, Any] = {"norm": "rms", "norm_offset": 0.0}
        fixed |= {"mixer_norm_eps": None} if self.in_heads else {"dt_limit": (0.0, math.inf)}
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise ArgumentError(f"`{name}` = {getattr(self, name)!r}: a {self.mixer} has only {only!r}.")
        limit = self.dt_limit
        numbers = isinstance(limit, tuple) and all(type(x) in (int, float) for x in limit) and len(limit) == 2
        if not numbers or not 0 <= limit[0] < limit[1]:
            raise ArgumentError(
                f"`dt_limit` = {limit!r} must be two numbers, the least rate and the greatest."
            )
        if self.in_heads and self.n_heads * self.d_head != self.d_inner:
            raise ArgumentError(
                f"`n_heads` = {self.n_heads} heads of `d_head` = {self.d_head} are {self.n_heads * self.d_head} "
                f"channels, but `d_inner` = {self.d_inner}."
            )
        if self.in_heads and self.n_heads % self.n_groups:
            raise ArgumentError(f"`n_heads` = {self.n_heads} is no multiple of `n_groups` = {self.n_groups}.")
        if self.n_params > MAX_PARAMETERS:
            raise ArgumentError(
                f"A config of {self.n_params:,} parameters is refused: at most {MAX_PARAMETERS:,} are accepted. "
                f"`d_vocab` = {self.d_vocab}, `d_model` = {self.d_model}, `n_layers` = {self.n_layers}, `d_inner` = "
                f"{self.d_inner}, `d_state` = {self.d_state}, `d_conv` = {self.d_conv}: which of them is mistaken?"
            )

    @property
    def in_heads(self) -> bool:
        """Whether channels and states come in heads."""
        return self.mixer == "mamba2"

    @property
    def d_shared(self) -> int:
        """Width of B, and of C, of all groups."""
        return self.n_groups * self.d_state if self.in_heads else self.d_state

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter, in forward order."""
        m, i, s, k, v = self.d_model, self.d_inner, self.d_shared, self.d_conv, self.d_vocab
        into = {"W_gate": (m, i), "W_x": (m, i)}
        biases = {"b_gate": (i,), "b_x": (i,)}
        conv = {"conv_x": (i, k)}
        if self.in_heads:
            h = self.n_heads
            into |= {"W_B": (m, s), "W_C": (m, s), "W_dt": (m, h)}
            biases |= {"b_B": (s,), "b_C": (s,), "b_dt_in": (h,)}
            conv |= {"conv_B": (s, k), "conv_C": (s, k)}
            rates = {"b_dt": (h,), "A_log": (h,), "D": (h,), "norm.w": (i,)}
        else:
            rates = {
                "W_dt_in": (i, self.dt_rank), "W_B": (i, s), "W_C": (i, s), "W_dt": (self.dt_rank, i), "b_dt": (i,),
                "A_log": (i, s), "D": (i,),
            }  # fmt: skip
        mixer = (
            into | (biases if self.proj_bias else {}) | conv
            | ({f"b_{name}": shape[:1] for name, shape in conv.items()} if self.conv_bias else {})
            | rates | {"W_O": (i, m)} | ({"b_O": (m,)} if self.proj_bias else {})
        )  # fmt: skip
        blocks = {"ln1.w": (m,)} | {f"mixer.{name}": shape for name, shape in mixer.items()}
        layers = {f"blocks.{path}": (self.n_layers, *shape) for path, shape in blocks.items()}
        return {"W_E": (v, m)} | layers | {"ln_final.w": (m,)} | ({} if self.tied else {"W_U": (m, v)})

    @property
    def letters(self) -> Mapping[str, int]:
        """The sizes that layouts of weights name (`families/rule.py`)."""
        sizes = {"v": self.d_vocab, "m": self.d_model, "i": self.d_inner, "n": self.d_state, "k": self.d_conv}
        own = {"h": self.n_heads, "s": self.d_shared} if self.in_heads else {"r": self.dt_rank}
        return sizes | own
