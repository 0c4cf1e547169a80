"""The vision transformer: ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) and its kin.

DeiT (Touvron et al. 2020, arXiv:2012.12877) has a distillation token, CLIP's image side (Radford et al. 2021,
arXiv:2103.00020) a norm on the first stream and its last norm on the class token alone, DINOv2 (Oquab et al. 2023,
arXiv:2304.07193) learned scales on what is written (Touvron et al. 2021, arXiv:2103.17239) and images of any size.

An image is cut into patches, each of which is projected (`patch_embed`); a class token, perhaps a distillation token,
stands before them (`embed`), and everything sees everything. Blocks are a decoder's: what they write is all that is
added,

    resid_pre of layer 0 = embed + pos_embed             (CLIP: the norm `ln_embed` of it)
    resid_post           = resid_pre + attn_out + mlp_out

with learned scales inside of what is written. Position 0 is the class token; patches follow row by row from the top
left, so that the one in row i and column j is position `config.n_special + i * config.grid[1] + j`.

Cost as of a decoder of that size on as many tokens as there are patches. Methods that resume from a layer, pair prompts
or read the next token's logits need a decoder.
"""

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.models.attention import Attention
from mechjax.models.contraction import affine, contract
from mechjax.models.marks import marks, marks_of, under
from mechjax.models.mlp import MLP
from mechjax.models.norms import Norm
from mechjax.models.patches import as_pixels, interpolated, patches
from mechjax.models.positions import Places, Sequence, Varying
from mechjax.models.unhashed import Unhashed
from mechjax.models.vit_config import ViTConfig
from mechjax.parallel.examples import over_examples

Pixels = Float[Array, "*batch channel height width"] | np.ndarray | SequenceOf[Any]
"""Images: floating-point numbers of any leading axes, channels before rows and columns."""


class Seen(Record):
    """What a vision transformer makes of its images.

    Attributes:
        last: The last stream, normed where the last norm stands on all of it (transformers' `last_hidden_state`).
            Shape (*batch, pos, d_model).
        pooled: Summary of the image; None without pooler. Shape (*batch, d_model).
        logits: Of the classes; None without that head. Shape (*batch, d_class).
        image_embed: The pooled output projected for comparison with texts; None without. Shape (*batch, d_proj).
    """

    last: Float[Array, "*batch pos d_model"]
    pooled: Float[Array, "*batch d_model"] | None
    logits: Float[Array, "*batch d_class"] | None
    image_embed: Float[Array, "*batch d_proj"] | None


class ViTBlock(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis; the scales are None where the config has none."""

    ln1: Norm
    attn: Attention
    scale1: Float[Array, "*layer d_model"] | None
    ln2: Norm
    mlp: MLP
    scale2: Float[Array, "*layer d_model"] | None

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        sequence: Sequence,
        layer: Int[Array, ""] | int,
        config: ViTConfig,
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual after this block; `self` holds one layer's weights, `layer` only says which."""
        mark = marks_of(layer, config)
        resid = mark(over_examples(resid), "resid_pre")
        read = mark(resid, "attn_in")
        own = self.ln1(read, config, under(mark, "ln1"))
        attn_out = self.attn(read, own, self.ln1, sequence, Varying(None, None), config, mark)[0]
        mid = mark(over_examples(resid + mark(_scaled(attn_out, self.scale1), "attn_out")), "resid_mid")
        own = self.ln2(mark(mid, "mlp_in"), config, under(mark, "ln2"))
        mlp_out = mark(_scaled(self.mlp(own, config, mark), self.scale2), "mlp_out")
        return mark(over_examples(mid + mlp_out), "resid_post")


class ViT(Unhashed):
    """A vision transformer. A pytree with a pure `__call__`: `model(pixels) -> class logits`.

    Pixels are what the checkpoint's image processor gives: resized, scaled to 0..1 and normalised per channel,
    `(pixel / 255 - mean) / std`, by the `image_mean` and `image_std` of its preprocessor_config.json. Google's ViTs
    have 0.5 for both; DeiT and DINOv2 ImageNet's (0.485, 0.456, 0.406) and (0.229, 0.224, 0.225); CLIP (0.48145466,
    0.4578275, 0.40821073) and (0.26862954, 0.26130258, 0.27577711).

    Edits are data, so a sweep over patches is one program:

        effect = lambda pos: mj.intervene(model, mj.zero("resid_mid", layer=3, pos=pos))(pixels)
        logits = jax.vmap(effect)(jnp.arange(model.config.n_ctx))  # (pos, *batch, d_class)

    Attributes:
        W_patch, b_patch: The projection of patches; `b_patch` may be None.
        class_token, distillation_token: What stands before the patches; the second may be None.
        W_pos: Learned position embedding, of class tokens first, then of patches row by row.
        ln_embed: The norm on the first stream, or None.
        blocks: All blocks, every parameter with a leading layer axis.
        ln_final: The last norm, of the whole stream; None where it is `ln_pool`, of the class token alone.
        ln_pool: The other.
        W_pool, b_pool: `tanh(W_pool x + b_pool)` of the normed class token is the pooled output; None without.
        W_proj: Projection of the pooled output, or None.
        W_class, W_mean, b_class: Class logits of the class token and the mean of the patches; None without.
        W_distillation, b_distillation: Those of the distillation token; None without.
        config: The choices.
    """

    W_patch: Float[Array, "channel patch_height patch_width d_model"]
    b_patch: Float[Array, " d_model"] | None
    class_token: Float[Array, " d_model"]
    distillation_token: Float[Array, " d_model"] | None
    W_pos: Float[Array, "row d_model"]
    ln_embed: Norm | None
    blocks: ViTBlock
    ln_final: Norm | None
    ln_pool: Norm | None
    W_pool: Float[Array, "d_model d_model"] | None
    b_pool: Float[Array, " d_model"] | None
    W_proj: Float[Array, "d_model d_proj"] | None
    W_class: Float[Array, "d_model d_class"] | None
    W_mean: Float[Array, "d_model d_class"] | None
    b_class: Float[Array, " d_class"] | None
    W_distillation: Float[Array, "d_model d_class"] | None
    b_distillation: Float[Array, " d_class"] | None
    config: ViTConfig = eqx.field(static=True)

    @on_any_mesh
    def __call__(
        self, pixels: Pixels, *, interpolate_pos_encoding: bool = False
    ) -> Float[Array, "... d_out"]:
        """Class logits; without that head the projection of the image, and without that too the last stream.

        Args:
            pixels: Normalised images of shape (*batch, channel, height, width), cast to the weights' dtype.
            interpolate_pos_encoding: Whether images may have another size than `config.image_size`: the positions of
                patches are then interpolated, bicubically as transformers does. DINOv2 (`config.any_size`) always does.

        Raises:
            ShapeError: No such shape, another number of channels, or another size that was not asked for.
            ArgumentError: Integers, which are no normalised pixels.
        """
        seen = self.encode(pixels, interpolate_pos_encoding=interpolate_pos_encoding)
        first = seen.logits if seen.logits is not None else seen.image_embed
        return seen.last if first is None else first

    def encode(self, pixels: Pixels, *, interpolate_pos_encoding: bool = False) -> Seen:
        """Everything that the model's heads say; arguments and errors as of a call."""
        given = as_pixels(pixels, self.config, self.W_patch.dtype, any_size=interpolate_pos_encoding)
        return _forward(self, given)

    def embed(
        self, pixels: Float[Array, "*batch channel height width"]
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual stream entering the first block."""
        mark, config = marks(self.config), self.config
        cut = patches(pixels, config.patch_size)
        projected = contract("...icyjx,cyxm->...ijm", cut, self.W_patch, config)
        projected = projected if self.b_patch is None else projected + self.b_patch
        grid = projected.shape[-3], projected.shape[-2]
        flat = mark(
            projected.reshape(*projected.shape[:-3], grid[0] * grid[1], config.d_model), "patch_embed"
        )
        special = [token for token in (self.class_token, self.distillation_token) if token is not None]
        before = jnp.broadcast_to(jnp.stack(special), (*flat.shape[:-2], len(special), config.d_model))
        tokens = mark(jnp.concatenate((before, flat), -2), "embed")
        rows = interpolated(self.W_pos, config.n_special, config.grid, grid)
        summed = tokens + mark(jnp.broadcast_to(rows, tokens.shape), "pos_embed")
        return summed if self.ln_embed is None else self.ln_embed(summed, config, under(mark, "ln_embed"))

    def read(self, resid: Float[Array, "*batch pos d_model"]) -> Seen:
        """What the norms and heads after the last block make of the stream."""
        mark, config = marks(self.config), self.config
        last = resid if self.ln_final is None else self.ln_final(resid, config, under(mark, "ln_final"))
        first = last[..., 0, :]
        if self.ln_pool is not None:
            first = self.ln_pool(first, config, under(mark, "ln_pool"))
        pooled = embed = None
        if config.pooler != "none":
            dense = (
                first if self.W_pool is None else jnp.tanh(affine(first, self.W_pool, self.b_pool, config))
            )
            pooled = mark(dense, "pooled")
        if pooled is not None and self.W_proj is not None:
            embed = mark(affine(pooled, self.W_proj, None, config), "image_embed")
        return Seen(last, pooled, self._classify(last), embed)

    def _classify(self, last: Float[Array, "*batch pos d_model"]) -> Float[Array, "*batch d_class"] | None:
        """Logits of the classes; None without that head."""
        if self.W_class is None:
            return None
        mark, config = marks(self.config), self.config
        logits = affine(last[..., 0, :], self.W_class, self.b_class, config)
        if self.W_mean is not None:
            mean = mark(last[..., config.n_special :, :].mean(-2), "patch_mean")
            logits = logits + affine(mean, self.W_mean, None, config)
        if self.W_distillation is not None:
            logits = mark(logits, "class_token_logits")
            other = affine(last[..., 1, :], self.W_distillation, self.b_distillation, config)
            logits = (logits + mark(other, "distillation_logits")) / 2
        return mark(logits, "class_logits")


@eqx.filter_jit
def _forward(model: ViT, pixels: Array) -> Seen:
    resid = model.embed(pixels)
    n_pos = resid.shape[-2]
    places = Places(jnp.zeros(n_pos, jnp.int32))  # one slot: all see all
    sequence = Sequence(jnp.arange(n_pos, dtype=jnp.int32), places, places, None)

    def step(resid: Array, xs: tuple[ViTBlock, Array]) -> tuple[Array, None]:
        block, layer = xs
        return block(resid, sequence, layer, model.config), None

    resid, _ = lax.scan(step, resid, (model.blocks, jnp.arange(model.config.n_layers)))
    return model.read(resid)


def _scaled(x: Array, scale: Array | None) -> Array:
    return x if scale is None else x * scale


def assemble_vit(config: ViTConfig, params: Mapping[str, Any]) -> ViT:
    """A vision transformer that holds `params`, whose paths and shapes are those of `config.shapes`."""

    def build(module: type[eqx.Module], prefix: str, **parts: Any) -> Any:
        names = module.__dataclass_fields__.keys() - parts
        return module(**{name: params.get(f"{prefix}{name}") for name in names}, **parts)

    def norm(path: str) -> Norm | None:
        return build(Norm, f"{path}.") if f"{path}.w" in params else None

    block = build(
        ViTBlock, "blocks.",
        ln1=norm("blocks.ln1"), attn=build(Attention, "blocks.attn.", q_norm=None, k_norm=None),
        ln2=norm("blocks.ln2"), mlp=build(MLP, "blocks.mlp."),
    )  # fmt: skip
    norms = {name: norm(name) for name in ("ln_embed", "ln_final", "ln_pool")}
    return build(ViT, "", blocks=block, config=config, **norms)
