"""What a decoder is made of: orthogonal choices, no family names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mechjax.base.errors import ArgumentError
from mechjax.models.checked import check_choices, check_count, check_positive
from mechjax.models.experts import Experts
from mechjax.models.latent import Latent
from mechjax.models.model_config import MAX_LAYERS, MAX_PARAMETERS, ModelConfig
from mechjax.models.rope import Rope
from mechjax.models.shapes import layers_of, shapes_of

_DERIVED: Any = None  # replaced in __post_init__
_OPTIONAL = ("attn_softcap", "final_softcap", "qkv_clip")
_POSITIVE = (
    "norm_eps", "embed_scale", "alibi_scale", "residual_scale", "attn_scale", "logit_scale", *_OPTIONAL
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """The shape and choices of a decoder; static and hashable.

    Attributes, beside those of every model:
        d_vocab: Number of tokens.
        n_ctx: Longest sequence that the model was made for; a limit where positions are learned.
        n_heads: Number of query heads.
        n_kv_heads: Number of key and value heads; divides `n_heads`. Default: `n_heads`.
        d_head: Width of a head. Default: `d_model // n_heads`.
        d_mlp: Number of neurons of a block. Default: `4 * d_model`.
        norms: Where norms stand: "pre" (on what attention and MLP read), "post" (on what they write), "both", or "none"
            (nowhere, nor before the unembedding).
        norm_weight: Whether the norms have scales.
        norm_bias: Whether the norms have biases. Default: exactly LayerNorms with scales do.
        qk_norm: Norms on queries and keys, before rotation: "none", "shared" (each head by itself, one scale for all),
            "per_head" (each head by itself, with its own scale) or "joint" (all heads together).
        qk_norm_bias: Whether these have biases. Default: `norm_bias`.
        embed_scale: Factor on token embeddings, rounded to their dtype.
        embed_norm: Whether token embeddings are normalised.
        positions: "learned", "rotary", "alibi" or "none".
        position_offset: Rows of the learned position embedding that stand before the first position's.
        rotary_dim: How many dimensions of a head rotate; even. Default: `d_head`.
        rotary_layout: Which dimensions rotate together: "halves" (i with i + rotary_dim/2) or "pairs" (2i with 2i + 1).
        rope: How angles are made: one `Rope` for all layers, or one for each layer (None: it does not rotate).
        alibi_scale: Factor on ALiBi's slopes.
        alibi_dtype: The slopes, and they times positions, are rounded to it.
        residual: "serial" (the MLP reads what attention wrote), "parallel" (both read the block's input) or
            "parallel_shared" (both read it through one norm).
        residual_scale: Factor on what attention and MLP write.
        mlp: "plain", "gated" or "none" (attention only: blocks without MLP and without its norm).
        activation: "gelu" (exact), "gelu_new" (tanh), "silu", "relu" or "quick_gelu" (`x * sigmoid(1.702 x)`).
        qkv_bias, out_bias, mlp_bias, unembed_bias: Whether these projections have biases.
        qkv_clip: Queries, keys and values are clipped to at most this size; None for not at all.
        tied: Whether the unembedding is the embedding's transpose.
        attn_softcap, final_softcap: c of c * tanh(x / c) on attention scores and logits; None for neither.
        causal: Whether a token sees only those up to it; otherwise it sees all.
        windows: For each layer how many positions a query sees, itself included; None sees all.
        attn_scale: Factor on the scores. Default: `d_head**-0.5`.
        attn_sinks: Whether each head has a learned score of a key that is not there, which takes part of its pattern.
        logit_scale: Factor on the logits, before their soft-cap.
        experts: The mixture of experts that takes the MLP's place, in all layers or some; None for none.
        latent: The widths of latent attention; None for ordinary attention.

    Raises:
        ArgumentError: A number that is absurd or contradicts another; the message names the field.
    """

    d_vocab: int
    n_ctx: int
    n_heads: int
    n_kv_heads: int = _DERIVED
    d_head: int = _DERIVED
    d_mlp: int = _DERIVED
    norms: Literal["pre", "post", "both", "none"] = "pre"
    norm_weight: bool = True
    norm_bias: bool = _DERIVED
    qk_norm: Literal["none", "shared", "per_head", "joint"] = "none"
    qk_norm_bias: bool = _DERIVED
    embed_scale: float = 1.0
    embed_norm: bool = False
    positions: Literal["learned", "rotary", "alibi", "none"] = "learned"
    position_offset: int = 0
    rotary_dim: int = _DERIVED
    rotary_layout: Literal["halves", "pairs"] = "halves"
    rope: Rope | tuple[Rope | None, ...] = Rope()  # noqa: RUF009  frozen
    alibi_scale: float = 1.0
    alibi_dtype: Literal["float32", "bfloat16"] = "float32"
    residual: Literal["serial", "parallel", "parallel_shared"] = "serial"
    residual_scale: float = 1.0
    mlp: Literal["plain", "gated", "none"] = "plain"
    activation: Literal["gelu", "gelu_new", "silu", "relu", "quick_gelu"] = "gelu_new"
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    unembed_bias: bool = False
    qkv_clip: float | None = None
    tied: bool = True
    attn_softcap: float | None = None
    final_softcap: float | None = None
    causal: bool = True
    windows: tuple[int | None, ...] | None = None
    attn_scale: float = _DERIVED
    attn_sinks: bool = False
    logit_scale: float = 1.0
    experts: Experts | None = None
    latent: Latent | None = None

    def __post_init__(self) -> None:
        for name in ("d_vocab", "n_ctx", "d_model", "n_heads"):
            check_count(name, getattr(self, name))
        check_count("n_layers", self.n_layers, MAX_LAYERS)
        self._default("n_kv_heads", self.n_heads)
        if self.d_head is None and self.d_model % self.n_heads:
            raise ArgumentError(
                f"`d_model` = {self.d_model} is no multiple of `n_heads` = {self.n_heads}: change one or pass `d_head`."
            )
        self._default("d_head", self.d_model // self.n_heads)
        self._default("d_mlp", 4 * self.d_model)
        self._default("norm_bias", self.norm == "layer" and self.norm_weight)
        self._default("qk_norm_bias", self.norm_bias)
        for name in ("n_kv_heads", "d_head", "d_mlp"):
            check_count(name, getattr(self, name))
        self._default("rotary_dim", self.d_head)
        self._default("attn_scale", self.d_head**-0.5)
        for name in ("windows", "rope"):
            if isinstance(per_layer := getattr(self, name), list):
                object.__setattr__(self, name, tuple(per_layer))
        check_choices(self)
        self._check_numbers()

    def _default(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    def _check_numbers(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise ArgumentError(
                f"`n_heads` = {self.n_heads} is no multiple of `n_kv_heads` = {self.n_kv_heads}: "
                "every key head serves the same number of query heads."
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            check_positive(name, value)
        if self.norm_offset not in (0.0, 1.0):
            raise ArgumentError(f"`norm_offset` = {self.norm_offset!r} must be 0.0 or 1.0.")
        if self.norms != "pre" and self.residual == "parallel_shared":
            raise ArgumentError(
                f'`residual` = "parallel_shared" shares a norm before attention and MLP; `norms` = {self.norms!r} '
                'goes with "serial" or "parallel".'
            )
        if self.position_offset != 0:
            check_count("position_offset", self.position_offset)
        self._check_causal()
        self._check_rotation()
        self._check_windows()
        self._check_experts()
        self._check_latent()
        if self.n_params > MAX_PARAMETERS:
            raise ArgumentError(
                f"A config of {self.n_params:,} parameters is refused: at most {MAX_PARAMETERS:,} are accepted. "
                f"`d_vocab` = {self.d_vocab}, `n_ctx` = {self.n_ctx}, `d_model` = {self.d_model}, "
                f"`n_layers` = {self.n_layers}, `n_heads` = {self.n_heads}, `d_head` = {self.d_head}, "
                f"`d_mlp` = {self.d_mlp}: which of them is mistaken?"
            )

    def _check_causal(self) -> None:
        looks_back = {"windows": self.windows is not None, "positions": self.positions == "alibi"}
        if not self.causal and (found := [name for name, there in looks_back.items() if there]):
            raise ArgumentError(
                f"`{found[0]}` = {getattr(self, found[0])!r} counts positions back from each token, and with "
                "`causal` = False tokens see those after them too: use one or the other."
            )

    def _check_rotation(self) -> None:
        if self.positions != "rotary":
            return
        check_count("rotary_dim", self.rotary_dim)
        if self.rotary_dim % 2 or self.rotary_dim > self.d_head:
            raise ArgumentError(
                f"`rotary_dim` = {self.rotary_dim} must be even and at most `d_head` = {self.d_head}: "
                "dimensions of a head rotate two by two."
            )
        ropes = self.rope if isinstance(self.rope, tuple) else (self.rope,)
        fits = len(ropes) == self.n_layers or not isinstance(self.rope, tuple)
        if not fits or not all(
            isinstance(rope, Rope) or (rope is None and isinstance(self.rope, tuple)) for rope in ropes
        ):
            raise ArgumentError(
                f"`rope` = {self.rope!r} must be a Rope, or have one entry for each of the {self.n_layers} layers: a "
                "Rope, or None for a layer that does not rotate."
            )
        for rope in ropes:
            if rope is not None:
                rope.check(self.rotary_dim)

    def _check_windows(self) -> None:
        if self.windows is None:
            return
        if not isinstance(self.windows, tuple) or len(self.windows) != self.n_layers:
            raise ArgumentError(
                f"`windows` = {self.windows!r} must have one entry for each of the {self.n_layers} layers: "
                "a number of positions, or None for a layer that sees all."
            )
        for window in self.windows:
            if window is not None:
                check_count("windows", window)

    def _check_experts(self) -> None:
        if self.experts is None:
            return
        layers = self.experts.layers
        if self.mlp != "gated":
            raise ArgumentError(f'Experts are gated MLPs, but `mlp` = {self.mlp!r}: pass mlp="gated".')
        if layers is not None and (
            not layers or list(layers) != [i for i in range(self.n_layers) if i in layers]
        ):
            raise ArgumentError(
                f"`layers` = {layers!r} of Experts must be layers from 0 to {self.n_layers - 1} in order, or None for "
                "all."
            )

    def _check_latent(self) -> None:
        if self.latent is None:
            return
        width = self.latent.d_nope + self.latent.d_rope
        if (self.d_head, self.rotary_dim, self.n_kv_heads) != (width, self.latent.d_rope, self.n_heads):
            raise ArgumentError(
                f"Latent attention has heads of `d_nope + d_rope` = {width}, of which `d_rope` = {self.latent.d_rope} "
                f"rotate, and keys for each of the {self.n_heads} heads; `d_head` = {self.d_head}, `rotary_dim` = "
                f"{self.rotary_dim}, `n_kv_heads` = {self.n_kv_heads}."
            )
        if self.attn_sinks or self.qk_norm != "none" or self.qkv_clip is not None:
            raise ArgumentError(
                "Latent attention has no `attn_sinks`, no `qk_norm` and no `qkv_clip`: leave them out."
            )

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        if self.experts is None:
            return ()
        return tuple(range(self.n_layers)) if self.experts.layers is None else self.experts.layers

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """The layers that have an ordinary MLP."""
        return (
            ()
            if self.mlp == "none"
            else tuple(i for i in range(self.n_layers) if i not in self.expert_layers)
        )

    @property
    def mixed(self) -> bool:
        """Whether some layers have experts and others an ordinary MLP."""
        return bool(self.expert_layers and self.mlp_layers)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter ("blocks.attn.W_Q": (layer, d_model, head, d_head)), in forward order."""
        return shapes_of(self)

    def layers_of(self, path: str) -> tuple[int, ...]:
        """The layers that a parameter of the blocks stacks."""
        return layers_of(path, self)

    @property
    def apart(self) -> Mapping[str, int]:
        """Heads and experts, which may have a tensor each in a checkpoint."""
        experts = {} if self.experts is None else {"expert": self.experts.n_experts}
        return {"head": self.n_heads, "kv_head": self.n_kv_heads} | experts

    @property
    def letters(self) -> Mapping[str, int]:
        """The sizes that layouts of weights name (`families/rule.py`)."""
        sizes = {
            "v": self.d_vocab, "r": self.n_ctx + self.position_offset, "m": self.d_model, "h": self.n_heads,
            "n": self.n_kv_heads, "g": self.n_heads // self.n_kv_heads, "d": self.d_head, "f": self.d_mlp,
        }  # fmt: skip
        if (experts := self.experts) is not None:
            sizes |= {"e": experts.n_experts, "x": experts.d_expert, "s": experts.d_shared}
        if (latent := self.latent) is not None:
            sizes |= {"q": latent.q_rank or self.d_model, "c": latent.kv_rank}
            sizes |= {"o": latent.d_nope, "t": latent.d_rope, "u": latent.d_value}
        return sizes

    @property
    def ropes(self) -> tuple[Rope | None, ...]:
        """For each layer how it rotates; None for not at all."""
        if self.positions != "rotary":
            return (None,) * self.n_layers
        return self.rope if isinstance(self.rope, tuple) else (self.rope,) * self.n_layers
