"""T5, an encoder-decoder: Raffel et al. 2019, arXiv:1910.10683; mT5: Xue et al. 2020, arXiv:2010.11934.

The encoder reads a text, every token of which sees every other. The decoder reads another, causally, and in every
layer also what the encoder made of the first: cross-attention, whose queries are the decoder's and whose keys and
values are the encoder's. Sites of the encoder begin with `encoder.`; those of the decoder have the names that they have
in other decoders, and cross-attention's begin with `cross_`. Each of the two counts its own layers.

Attention knows positions by learned biases alone (`t5_attention`), so texts may have any length; scores are formed
whole. UMT5 (Chung et al. 2023, arXiv:2304.09151) has such biases in every layer, the others share the first layer's.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, TokenError
from mechjax.base.meshes import on_any_mesh
from mechjax.models.cache import Cache
from mechjax.models.contraction import contract
from mechjax.models.decoder import Tokens, as_tokens
from mechjax.models.embedding import rows
from mechjax.models.marks import marks
from mechjax.models.mlp import MLP
from mechjax.models.norms import Norm
from mechjax.models.positions import Places, count_positions
from mechjax.models.scores import visible
from mechjax.models.t5_attention import Names, T5Attention
from mechjax.models.t5_block import KeysValues, Source, Stack, T5Block, Text
from mechjax.models.t5_config import T5Config
from mechjax.models.unhashed import Unhashed

_ALONE = "This model is an encoder alone (`n_decoder_layers` = 0): it has no decoder"


class T5(Unhashed):
    """An encoder-decoder, or its encoder alone. A pytree with a pure `__call__`: `model(tokens, decoder_tokens)`.

    Attributes:
        W_E: Embedding of both texts; where `tied`, also the unembedding.
        encoder: The encoder.
        decoder: The decoder; None in an encoder alone.
        W_U: Unembedding; None where tied, and in an encoder alone.
        config: The choices.
    """

    W_E: Float[Array, "d_vocab d_model"]
    encoder: Stack
    decoder: Stack | None
    W_U: Float[Array, "d_model d_vocab"] | None
    config: T5Config = eqx.field(static=True)

    @on_any_mesh
    def __call__(
        self,
        tokens: Tokens,
        decoder_tokens: Tokens | None = None,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        decoder_mask: Bool[Array, "*batch decoder_pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
        decoder_positions: Int[Array, "*batch decoder_pos"] | None = None,
    ) -> Float[Array, "*batch out width"]:
        """Logits of the decoder's next token at every one of its positions; of an encoder alone, its output.

        Args:
            tokens: What the encoder reads: prompts (whose mask is then used), integer ids of shape (*batch, pos), or
                nested lists of them.
            decoder_tokens: What the decoder reads, in the same forms; `shift_right(labels)` makes it of what is to be
                predicted. An encoder alone reads none.
            mask: True for real tokens of the first text. Padding, wherever it stands, changes no real position, and no
                token of the decoder sees it; without a mask, the padding id is a token as any other.
            decoder_mask: The same of the second text.
            positions: Position of each token, where not simply the count of real tokens before it; only differences
                matter.
            decoder_positions: The same of the second text.

        Raises:
            TokenError: An id that is no token. (Inside `jit` it cannot be seen, and that example's logits are NaN.)
            ShapeError: Shapes that do not agree.
            ArgumentError: No text for the decoder, or one for an encoder alone.
        """
        tokens, mask = as_tokens(tokens, mask, self.config)
        if self.decoder is None:
            if decoder_tokens is not None or decoder_mask is not None:
                raise ArgumentError(f"{_ALONE}, which would read `decoder_tokens`: leave them out.")
            return _encode(self, tokens, mask, positions)
        if decoder_tokens is None:
            raise ArgumentError(
                "An encoder-decoder reads two texts, and `decoder_tokens` is missing: `model(tokens, decoder_tokens)`. "
                "They are `model.shift_right(labels)` where you know what is to be predicted, or the start token "
                f"{self.config.start_token} and what was generated so far. `model.encode(tokens)` runs the encoder "
                "alone; methods for decoders, which call `model(tokens)`, do not take it."
            )
        decoder_tokens, decoder_mask = self._second(tokens.shape[:-1], decoder_tokens, decoder_mask)
        return _forward(self, tokens, mask, positions, decoder_tokens, decoder_mask, decoder_positions)

    @on_any_mesh
    def encode(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch pos d_model"]:
        """The encoder's output, normed: what cross-attention reads. Arguments and errors as of a call."""
        tokens, mask = as_tokens(tokens, mask, self.config)
        return _encode(self, tokens, mask, positions)

    @on_any_mesh
    def decode(
        self,
        encoded: Float[Array, "*batch pos d_model"],
        decoder_tokens: Tokens,
        *,
        mask: Bool[Array, "*own_batch own_pos"] | None = None,
        decoder_mask: Bool[Array, "*batch decoder_pos"] | None = None,
        decoder_positions: Int[Array, "*batch decoder_pos"] | None = None,
    ) -> Float[Array, "*batch decoder_pos d_vocab"]:
        """Logits, given what `encode` gave and its mask; other arguments and errors as of a call."""
        if self.decoder is None:
            raise ArgumentError(f"{_ALONE}.")
        if mask is not None and mask.shape != encoded.shape[:-1]:
            raise ShapeError(
                f"`mask` has shape {mask.shape}, `encoded` {encoded.shape}: all but the last must agree."
            )
        text = self._second(encoded.shape[:-2], decoder_tokens, decoder_mask)
        return _decode(self, encoded, mask, *text, decoder_positions)

    def encoder_alone(self) -> "T5":
        """The encoder as a model of its own: `model.encoder_alone()(tokens)` is `model.encode(tokens)`."""
        config = replace(self.config, n_decoder_layers=0, tied=True, source=None)
        return T5(self.W_E, self.encoder, None, None, config)

    def shift_right(self, labels: Int[Array, "*batch pos"] | np.ndarray) -> Int[Array, "*batch pos"]:
        """The decoder's tokens for what it is to predict: the start token, then all labels but the last.

        Negative labels, such as -100 for "not counted", become the start token, which T5 pads with.
        """
        ids = jnp.asarray(labels)
        if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim == 0:
            raise TokenError(
                f"`labels` must be integer ids of shape (*batch, pos), got {ids.dtype} {ids.shape}."
            )
        start = jnp.int32(self.config.start_token)
        ids = jnp.where(ids < 0, start, ids.astype(jnp.int32))
        return jnp.concatenate((jnp.full((*ids.shape[:-1], 1), start), ids[..., :-1]), -1)

    def embed(self, tokens: Int[Array, "*batch pos"], stack: Stack) -> Float[Array, "*batch pos d_model"]:
        """The residual stream entering the first block of a stack."""
        embedded = rows(self.W_E, tokens)
        return Names(marks(self.config), stack.prefix)(embedded, "embed")

    def encoded(
        self, tokens: Int[Array, "*batch pos"], mask: Bool[Array, "*batch pos"] | None,
        positions: Int[Array, "*batch pos"] | None,
    ) -> Float[Array, "*batch pos d_model"]:  # fmt: skip
        """The encoder's output, of tokens that were checked."""
        n_pos = tokens.shape[-1]
        positions = count_positions(n_pos, mask) if positions is None else positions
        same = Places(jnp.zeros(n_pos, jnp.int32), mask)  # one slot: all see all
        text = Text(positions, positions, None if mask is None else visible(same, same, None))
        return self.encoder(self.embed(tokens, self.encoder), text, self.config)[0]

    def unembed(self, normalized: Float[Array, "*batch pos d_model"]) -> Float[Array, "*batch pos d_vocab"]:
        """Logits of the decoder's output, which is normed already."""
        if self.config.scaled:
            normalized = normalized * jnp.asarray(self.config.d_model**-0.5, normalized.dtype)
        spec, W = ("...m,vm->...v", self.W_E) if self.W_U is None else ("...m,mv->...v", self.W_U)
        return marks(self.config)(contract(spec, normalized, W, self.config), "logits")

    def _second(
        self, lead: tuple[int, ...], tokens: Tokens, mask: Array | None
    ) -> tuple[Array, Array | None]:
        """The decoder's tokens and mask, checked: as many texts as the encoder has."""
        ids, mask = as_tokens(tokens, mask, self.config)
        if ids.shape[:-1] != lead:
            raise ShapeError(
                f"The decoder's tokens have shape {ids.shape}, and the encoder's text has the batch axes {lead}: they "
                "must be equal, one text of the decoder for each that the encoder reads."
            )
        return ids, mask


def through_decoder(
    model: T5,
    tokens: Int[Array, "*batch pos"],
    source: Source,
    mask: Bool[Array, "*batch pos"] | None = None,
    positions: Int[Array, "*batch pos"] | None = None,
    cache: Cache | None = None,
    *,
    keeps: bool = False,
) -> tuple[Float[Array, "*batch pos d_model"], Any, KeysValues | None]:
    """The decoder's output, normed; the cache, which must have admitted the tokens; cross-attention's keys and values.

    Raises:
        ArgumentError: An encoder alone.
    """
    if model.decoder is None:
        raise ArgumentError(f"{_ALONE}.")
    n_pos = tokens.shape[-1]
    if cache is None:
        positions = count_positions(n_pos, mask) if positions is None else positions
        same = Places(jnp.arange(n_pos, dtype=jnp.int32), mask)
        text = Text(positions, positions, visible(same, same, None))
    else:
        queries = Places(cache.length + jnp.arange(n_pos), cache.next(cache.real, n_pos))
        seen = visible(queries, Places(jnp.arange(cache.n_slots), cache.real), None)
        text = Text(cache.next(cache.positions, n_pos), cache.positions, seen)
    return model.decoder(model.embed(tokens, model.decoder), text, model.config, source, cache, keeps=keeps)


@eqx.filter_jit
def _encode(model: T5, tokens: Array, mask: Array | None, positions: Array | None) -> Array:
    return model.encoded(tokens, mask, positions)


@eqx.filter_jit
def _decode(
    model: T5, encoded: Array, mask: Array | None, tokens: Array, own: Array | None, positions: Array | None
) -> Array:
    return model.unembed(through_decoder(model, tokens, Source(encoded, mask), own, positions)[0])


@eqx.filter_jit
def _forward(
    model: T5,
    tokens: Array,
    mask: Array | None,
    positions: Array | None,
    decoder_tokens: Array,
    decoder_mask: Array | None,
    decoder_positions: Array | None,
) -> Array:
    source = Source(model.encoded(tokens, mask, positions), mask)
    return model.unembed(through_decoder(model, decoder_tokens, source, decoder_mask, decoder_positions)[0])


def assemble_t5(config: T5Config, params: Mapping[str, Any]) -> T5:
    """A model that holds `params`, whose paths and shapes are those of `config.shapes`."""

    def build(module: type[eqx.Module], at: str, **parts: Any) -> Any:
        names = module.__dataclass_fields__.keys() - parts
        return module(**{name: params.get(f"{at}{name}") for name in names}, **parts)

    def stack(path: str, prefix: str, *, cross: bool) -> Stack:
        block = f"{path}.blocks."
        blocks = T5Block(
            ln1=build(Norm, f"{block}ln1."),
            attn=build(T5Attention, f"{block}attn."),
            ln_cross=build(Norm, f"{block}ln_cross.") if cross else None,
            cross=build(T5Attention, f"{block}cross.") if cross else None,
            ln2=build(Norm, f"{block}ln2."),
            mlp=build(MLP, f"{block}mlp."),
        )
        return build(
            Stack, f"{path}.", blocks=blocks, ln_final=build(Norm, f"{path}.ln_final."), prefix=prefix
        )

    decoder = stack("decoder", "", cross=True) if config.n_decoder_layers else None
    return build(T5, "", encoder=stack("encoder", "encoder.", cross=False), decoder=decoder, config=config)
