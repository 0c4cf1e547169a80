"""The encoder: BERT (Devlin et al. 2018, arXiv:1810.04805) and RoBERTa (Liu et al. 2019, arXiv:1907.11692).

Every token sees every other, and a norm stands on the residual stream itself after each sum (post-LayerNorm), so what
is written is not simply added up. The invariant of a layer reads

    resid_mid  = ln1(resid_pre + attn_out)
    resid_post = ln2(resid_mid + mlp_out)

with `ln1.normalized == resid_mid` and `ln2.normalized == resid_post`, and the first stream is
`ln_embed(embed + pos_embed + token_type_embed)`. Taking a component's share of a later stream needs the norms' scales,
which are sites. `attn_in` and `mlp_in` are what the two read, the stream itself; editing them leaves it alone.

Cost as of a decoder of that size. Methods that resume from a layer or read the next token's logits need a decoder.
"""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ShapeError, TokenError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.models.attention import Attention
from mechjax.models.contraction import affine
from mechjax.models.decoder import Tokens, as_tokens
from mechjax.models.embedding import rows
from mechjax.models.encoder_config import EncoderConfig
from mechjax.models.marks import marks, marks_of, under
from mechjax.models.mlp import ACTIVATIONS, MLP
from mechjax.models.norms import Norm
from mechjax.models.positions import Places, Sequence, Varying, count_positions
from mechjax.models.unhashed import Unhashed


class Encoded(Record):
    """What an encoder makes of its tokens.

    Attributes:
        resid: The last residual stream. Shape (*batch, pos, d_model).
        logits: Of the masked token at every position; None without that head. Shape (*batch, pos, d_vocab).
        pooled: Summary of the first real token; None without pooler. Shape (*batch, d_model).
        nsp_logits: That the second text follows the first, and that it does not; None without that head.
            Shape (*batch, 2).
    """

    resid: Float[Array, "*batch pos d_model"]
    logits: Float[Array, "*batch pos d_vocab"] | None
    pooled: Float[Array, "*batch d_model"] | None
    nsp_logits: Float[Array, "*batch relation"] | None


class EncoderBlock(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    attn: Attention
    ln1: Norm
    mlp: MLP
    ln2: Norm

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        sequence: Sequence,
        layer: Int[Array, ""] | int,
        config: EncoderConfig,
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual after this block; `self` holds one layer's weights, `layer` only says which."""
        mark = marks_of(layer, config)
        resid = mark(resid, "resid_pre")
        read = mark(resid, "attn_in")
        alike = Varying(None, None)
        attn_out = mark(self.attn(read, read, None, sequence, alike, config, mark)[0], "attn_out")
        mid = mark(self.ln1(resid + attn_out, config, under(mark, "ln1")), "resid_mid")
        mlp_out = mark(self.mlp(mark(mid, "mlp_in"), config, mark), "mlp_out")
        return mark(self.ln2(mid + mlp_out, config, under(mark, "ln2")), "resid_post")


class Encoder(Unhashed):
    """A bidirectional transformer. A pytree with a pure `__call__`: `model(tokens) -> logits`.

    Attributes:
        W_E: Embedding; where `tied`, also the unembedding.
        W_pos: Learned position embedding.
        W_type: Embedding of token types.
        ln_embed: The norm on the sum of the three.
        blocks: All blocks, every parameter with a leading layer axis.
        W_head, b_head, ln_final: What the unembedding reads is `ln_final(act(W_head x + b_head))`; None without `mlm`.
        W_U: Unembedding; None where tied or without `mlm`.
        b_U: Its bias, or None.
        W_pool, b_pool: `tanh(W_pool x + b_pool)` of the first token is the pooled output; None without `pooler`.
        W_nsp, b_nsp: The next-sentence head, which reads it; None without `nsp`.
        config: The choices.
    """

    W_E: Float[Array, "d_vocab d_model"]
    W_pos: Float[Array, "row d_model"]
    W_type: Float[Array, "type d_model"]
    ln_embed: Norm
    blocks: EncoderBlock
    W_head: Float[Array, "d_model d_model"] | None
    b_head: Float[Array, " d_model"] | None
    ln_final: Norm | None
    W_U: Float[Array, "d_model d_vocab"] | None
    b_U: Float[Array, " d_vocab"] | None
    W_pool: Float[Array, "d_model d_model"] | None
    b_pool: Float[Array, " d_model"] | None
    W_nsp: Float[Array, "d_model relation"] | None
    b_nsp: Float[Array, " relation"] | None
    config: EncoderConfig = eqx.field(static=True)

    @on_any_mesh
    def __call__(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
        token_types: Int[Array, "*batch pos"] | np.ndarray | None = None,
    ) -> Float[Array, "*batch pos width"]:
        """Logits of the token at every position; of a model without that head, the last residual stream.

        Args:
            tokens: Prompts (whose mask is then used), integer ids of shape (*batch, pos), or nested lists of them.
            mask: True for real tokens. Padding, wherever it stands, changes no real position; without a mask, the
                padding id is a token as any other.
            positions: Position of each token from 0, where not simply the count of real tokens before it.
            token_types: Which text each token belongs to; all to the first by default.

        Raises:
            TokenError: An id that is no token or no token type. (Inside `jit` it cannot be seen, and that example's
                logits are NaN.)
            ShapeError: Shapes that do not agree, or more tokens than there are positions.
        """
        encoded = self.encode(tokens, mask=mask, positions=positions, token_types=token_types)
        return encoded.resid if encoded.logits is None else encoded.logits

    def encode(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
        token_types: Int[Array, "*batch pos"] | np.ndarray | None = None,
    ) -> Encoded:
        """Everything that the model's heads say; arguments and errors as of a call."""
        tokens, mask = as_tokens(tokens, mask, self.config)
        types = _as_types(token_types, tokens, mask, self.config)
        return _forward(self, tokens, mask, positions, types)

    def embed(
        self,
        tokens: Int[Array, "*batch pos"],
        positions: Int[Array, "*positions pos"],
        types: Int[Array, "*batch pos"],
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual stream entering the first block."""
        mark = marks(self.config)
        summed = mark(rows(self.W_E, tokens), "embed")
        places = rows(self.W_pos, positions + self.config.position_offset)
        summed = summed + mark(rows(self.W_type, types), "token_type_embed")
        summed = summed + mark(jnp.broadcast_to(places, summed.shape), "pos_embed")
        return self.ln_embed(summed, self.config, under(mark, "ln_embed"))

    def unembed(self, resid: Float[Array, "*batch pos d_model"]) -> Float[Array, "*batch pos d_vocab"] | None:
        """Logits of the masked token; None without that head."""
        if self.W_head is None or self.ln_final is None:
            return None
        act, mark = ACTIVATIONS[self.config.head_activation], marks(self.config)
        hidden = act(affine(resid, self.W_head, self.b_head, self.config))
        normalized = self.ln_final(hidden, self.config, under(mark, "ln_final"))
        spec, W = ("...m,vm->...v", self.W_E) if self.W_U is None else ("...m,mv->...v", self.W_U)
        return mark(affine(normalized, W, self.b_U, self.config, spec), "logits")

    def pool(
        self, resid: Float[Array, "*batch pos d_model"], mask: Bool[Array, "*batch pos"] | None = None
    ) -> tuple[Float[Array, "*batch d_model"] | None, Float[Array, "*batch relation"] | None]:
        """Summary of the first real token, and the next-sentence logits; None for what the model does not have."""
        if self.W_pool is None:
            return None, None
        mark = marks(self.config)
        if mask is None:
            first = resid[..., 0, :]
        else:
            first = jnp.take_along_axis(resid, mask.argmax(-1)[..., None, None], -2)[..., 0, :]
        pooled = affine(first, self.W_pool, self.b_pool, self.config)
        pooled = mark(jnp.tanh(pooled), "pooled")
        if self.W_nsp is None:
            return pooled, None
        return pooled, mark(affine(pooled, self.W_nsp, self.b_nsp, self.config), "nsp_logits")


@eqx.filter_jit
def _forward(
    model: Encoder, tokens: Array, mask: Array | None, positions: Array | None, types: Array
) -> Encoded:
    n_pos = tokens.shape[-1]
    positions = count_positions(n_pos, mask) if positions is None else positions
    places = Places(jnp.zeros(n_pos, jnp.int32), mask)  # one slot: all see all
    sequence = Sequence(positions, places, places, None)

    def step(resid: Array, xs: tuple[EncoderBlock, Array]) -> tuple[Array, None]:
        block, layer = xs
        return block(resid, sequence, layer, model.config), None

    resid = model.embed(tokens, positions, types)
    resid, _ = lax.scan(step, resid, (model.blocks, jnp.arange(model.config.n_layers)))
    pooled, nsp_logits = model.pool(resid, mask)
    return Encoded(resid, model.unembed(resid), pooled, nsp_logits)


def _as_types(types: Any, tokens: Array, mask: Array | None, config: EncoderConfig) -> Array:
    if types is None:
        return jnp.zeros_like(tokens)
    if types.shape != tokens.shape:
        raise ShapeError(
            f"`token_types` has shape {types.shape}, tokens have {tokens.shape}: they must be equal."
        )
    if not isinstance(types, Tracer):
        ids = whole(types)
        wrong = ids[(ids < 0) | (ids >= config.n_types)]
        if wrong.size:
            raise TokenError(
                f"Token type {int(wrong[0])} is out of range: the model has {config.n_types} types, from 0. "
                "Leave `token_types` out where there is one text."
            )
    types = jnp.asarray(types, jnp.int32)
    return types if mask is None else jnp.where(mask, types, 0)


def assemble_encoder(config: EncoderConfig, params: Mapping[str, Any]) -> Encoder:
    """An encoder that holds `params`, whose paths and shapes are those of `config.shapes`."""

    def build(module: type[eqx.Module], prefix: str, **parts: Any) -> Any:
        names = module.__dataclass_fields__.keys() - parts
        return module(**{name: params.get(f"{prefix}{name}") for name in names}, **parts)

    block = EncoderBlock(
        attn=build(Attention, "blocks.attn.", q_norm=None, k_norm=None),
        ln1=build(Norm, "blocks.ln1."),
        mlp=build(MLP, "blocks.mlp."),
        ln2=build(Norm, "blocks.ln2."),
    )
    ln_final = build(Norm, "ln_final.") if config.mlm else None
    parts = {"ln_embed": build(Norm, "ln_embed."), "blocks": block, "ln_final": ln_final, "config": config}
    return build(Encoder, "", **parts)
