"""What a vision transformer is made of: a decoder's choices, images and patches, and its heads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mechjax.base.errors import ArgumentError
from mechjax.models.checked import check_count
from mechjax.models.config import Config

_LARGEST = (
    2**16
)  # more pixels along a side, or channels, are refused: a config that asks for them is mistaken


@dataclass(frozen=True, kw_only=True)
class ViTConfig(Config):
    """The shape and choices of a vision transformer; static and hashable.

    Of a decoder's choices it has learned positions, norms before attention and MLP, serial residuals and full
    attention; what else is asked for is refused. `embed_norm` stands on the sum of patches and positions, as in CLIP.

    Attributes:
        image_size: Height and width, in pixels, of the images that its positions were made for.
        patch_size: Height and width of a patch. Pixels right of and below the last whole patch are not read.
        n_channels: Colours of a pixel.
        distilled: Whether a distillation token stands behind the class token (DeiT).
        patch_bias: Whether the projection of patches has a bias.
        layer_scale: Whether what attention and MLP write is multiplied, dimension by dimension, by learned scales.
        any_size: Whether images of other sizes are taken unasked, the positions interpolated.
        last_norm: What the last norm stands on: the "stream", or the "class" token alone (CLIP).
        pooler: "none", "class" (the class token after the last norm) or "tanh" (a layer of its own on that).
        head: Of what the class logits are read: "none" (there are none), "class" (the class token), "class_mean" (it
            and the mean of the patches) or "class_distillation" (it and the distillation token, two heads, averaged).
        classes: Names of the classes.
        d_proj: Width that the pooled output is projected to, for comparison with texts; None for no projection.
        n_ctx: Positions: special tokens and patches. It follows from the sizes.
        d_vocab: An image has no vocabulary: 1.

    Raises:
        ArgumentError: A number that is absurd, or a choice that vision transformers do not have; the message names the
            field.
    """

    reads_pixels: ClassVar[bool] = True

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    n_channels: int = 3
    distilled: bool = False
    patch_bias: bool = True
    layer_scale: bool = False
    any_size: bool = False
    last_norm: Literal["stream", "class"] = "stream"
    pooler: Literal["none", "class", "tanh"] = "none"
    head: Literal["none", "class", "class_mean", "class_distillation"] = "none"
    classes: tuple[str, ...] = ()
    d_proj: int | None = None
    n_ctx: int = field(init=False, default=0)
    d_vocab: int = field(init=False, default=1)
    activation: Literal["gelu", "gelu_new", "silu", "relu", "quick_gelu"] = "gelu"
    causal: bool = False
    tied: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            self._check_size(name, getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_count("n_channels", self.n_channels, _LARGEST)
        rows, columns = self.grid
        if not rows or not columns:
            raise ArgumentError(
                f"`patch_size` = {self.patch_size} is larger than `image_size` = {self.image_size}: there is no patch."
            )
        object.__setattr__(self, "n_ctx", self.n_special + rows * columns)
        super().__post_init__()
        self._check_heads()
        fixed = {
            "norm": "layer", "norm_weight": True, "norm_bias": True, "norms": "pre", "positions": "learned",
            "position_offset": 0, "residual": "serial", "out_bias": True, "mlp_bias": True, "unembed_bias": False,
            "windows": None, "qk_norm": "none", "qkv_clip": None, "n_kv_heads": self.n_heads, "embed_scale": 1.0,
            "residual_scale": 1.0, "logit_scale": 1.0, "attn_softcap": None, "final_softcap": None, "causal": False,
            "tied": False, "attn_sinks": False, "experts": None, "latent": None,
        }  # fmt: skip
        for name, only in fixed.items():
            if getattr(self, name) != only:
                raise ArgumentError(
                    f"`{name}` = {getattr(self, name)!r}: a vision transformer has only {only!r}."
                )
        if self.mlp == "none":
            raise ArgumentError("`mlp` = 'none': a vision transformer has only 'plain' or 'gated'.")

    @staticmethod
    def _check_size(name: str, size: Any) -> None:
        if not isinstance(size, (tuple, list)) or len(size) != 2:
            raise ArgumentError(f"`{name}` = {size!r} must be two whole numbers: height and width in pixels.")
        for pixels in size:
            check_count(name, pixels, _LARGEST)

    def _check_heads(self) -> None:
        if isinstance(self.classes, list):
            object.__setattr__(self, "classes", tuple(self.classes))
        if not isinstance(self.classes, tuple) or not all(isinstance(name, str) for name in self.classes):
            raise ArgumentError(f"`classes` = {self.classes!r} must be the names of the classes, as strings.")
        if bool(self.classes) != (self.head != "none"):
            raise ArgumentError(
                f"`head` = {self.head!r} with {len(self.classes)} `classes`: a head needs the names of its classes, "
                "and there are none without a head."
            )
        if self.head == "class_distillation" and not self.distilled:
            raise ArgumentError(
                "`head` = 'class_distillation' reads the distillation token, so it needs `distilled` = True."
            )
        if self.last_norm == "class" and (self.head != "none" or self.pooler != "class"):
            raise ArgumentError(
                "`last_norm` = 'class' gives the pooled output itself, so it goes with `pooler` = 'class' and "
                f"`head` = 'none'; got {self.pooler!r} and {self.head!r}."
            )
        if self.d_proj is not None:
            check_count("d_proj", self.d_proj)
            if self.pooler == "none":
                raise ArgumentError(
                    f"`d_proj` = {self.d_proj} projects the pooled output, so it needs a `pooler`."
                )

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1]

    @property
    def n_special(self) -> int:
        """Positions before the patches: of the class token and the distillation token."""
        return 1 + int(self.distilled)

    def inputs(self, batch: int, n_pos: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Pixels of so many images; the number of positions follows from their size, whatever is asked for."""
        return (jax.ShapeDtypeStruct((batch, self.n_channels, *self.image_size), jnp.float32),)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Path and shape of every parameter, in forward order."""
        m, h, d, f, k = self.d_model, self.n_heads, self.d_head, self.d_mlp, len(self.classes)
        gated, read, pooled = self.mlp == "gated", self.head, self.pooler == "tanh"

        def norm(path: str) -> dict[str, tuple[int, ...]]:
            return {f"{path}.w": (m,), f"{path}.b": (m,)}

        def some(shapes: dict[str, tuple[int, ...]], **has: bool) -> dict[str, tuple[int, ...]]:
            return {name: shape for name, shape in shapes.items() if has.get(name.rpartition(".")[2], True)}

        first = some({
            "W_patch": (self.n_channels, *self.patch_size, m), "b_patch": (m,), "class_token": (m,),
            "distillation_token": (m,), "W_pos": (self.n_ctx, m),
        }, b_patch=self.patch_bias, distillation_token=self.distilled)  # fmt: skip
        block = some({
            **norm("ln1"),
            "attn.W_Q": (m, h, d), "attn.W_K": (m, h, d), "attn.W_V": (m, h, d), "attn.W_O": (h, d, m),
            "attn.b_Q": (h, d), "attn.b_K": (h, d), "attn.b_V": (h, d), "attn.b_O": (m,), "scale1": (m,),
            **norm("ln2"),
            "mlp.W_in": (m, f), "mlp.W_gate": (m, f), "mlp.W_out": (f, m),
            "mlp.b_in": (f,), "mlp.b_gate": (f,), "mlp.b_out": (m,), "scale2": (m,),
        }, W_gate=gated, b_gate=gated, scale1=self.layer_scale, scale2=self.layer_scale,
           **dict.fromkeys(("b_Q", "b_K", "b_V"), self.qkv_bias))  # fmt: skip
        heads = some({
            "W_pool": (m, m), "b_pool": (m,), "W_proj": (m, self.d_proj or 0),
            "W_class": (m, k), "W_mean": (m, k), "b_class": (k,), "W_distillation": (m, k), "b_distillation": (k,),
        }, W_pool=pooled, b_pool=pooled, W_proj=self.d_proj is not None, W_class=read != "none", b_class=read != "none",
           W_mean=read == "class_mean",
           **dict.fromkeys(("W_distillation", "b_distillation"), read == "class_distillation"))  # fmt: skip
        return (
            first
            | (norm("ln_embed") if self.embed_norm else {})
            | {f"blocks.{path}": (self.n_layers, *shape) for path, shape in block.items()}
            | norm("ln_final" if self.last_norm == "stream" else "ln_pool")
            | heads
        )

    @property
    def letters(self) -> Mapping[str, int]:
        """The sizes that layouts of weights name (`families/rule.py`)."""
        return {
            **super().letters, "c": self.n_channels, "y": self.patch_size[0], "x": self.patch_size[1],
            "k": len(self.classes), "o": self.d_model, "j": self.d_proj or 0,
        }  # fmt: skip
