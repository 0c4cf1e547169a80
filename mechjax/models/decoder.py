"""The decoder: one scanned block, every choice in its config, every activation a site."""

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError, TokenError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.prompts import Prompts
from mechjax.base.whole import whole
from mechjax.models.block import Block
from mechjax.models.cache import Cache, Keys
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.embedding import rows
from mechjax.models.marks import Mark, marks, under
from mechjax.models.model_config import ModelConfig
from mechjax.models.norms import Norm
from mechjax.models.positions import (
    Sequence,
    Varying,
    arrange,
    check_growth,
    count_positions,
    other_angles,
    outgrows,
    varying,
)
from mechjax.models.segments import kinds_of, segments
from mechjax.models.unhashed import Unhashed
from mechjax.parallel.examples import over_examples

Tokens = Prompts | Array | np.ndarray | SequenceOf[Any]
"""Token ids: a batch with its mask, an integer array of any leading axes, or nested lists."""

_FEW = 32  # rows, as in a step of generation, that XLA's CPU backend multiplies faster where a large table comes first


class Decoder(Unhashed):
    """A transformer, causal unless told otherwise. A pytree with a pure `__call__`: `model(tokens) -> logits`.

    Attributes:
        W_E: Embedding; where `tied`, also the unembedding.
        W_pos: Learned position embedding, or None.
        ln_embed: The norm on token embeddings, or None.
        blocks: All blocks, every parameter with a leading layer axis.
        ln_final: The last norm, or None.
        W_U: Unembedding; None where tied.
        b_U: Unembedding's bias, or None.
        config: The choices.
    """

    W_E: Float[Array, "d_vocab d_model"]
    W_pos: Float[Array, "row d_model"] | None
    ln_embed: Norm | None
    blocks: Block
    ln_final: Norm | None
    W_U: Float[Array, "d_model d_vocab"] | None
    b_U: Float[Array, " d_vocab"] | None
    config: Config = eqx.field(static=True)

    @overload
    def __call__(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
        cache: None = None,
    ) -> Float[Array, "*batch pos d_vocab"]: ...

    @overload
    def __call__(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
        cache: Cache,
    ) -> tuple[Float[Array, "*batch pos d_vocab"], Cache]: ...

    @on_any_mesh
    def __call__(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Logits of the next token at every position, of shape (*batch, pos, d_vocab); with a cache, `(logits, cache)`.

        Args:
            tokens: Prompts (whose mask is then used), integer ids of shape (*batch, pos), or nested lists of them.
            mask: True for real tokens. Padding, wherever it stands, changes no real position.
            positions: Position of each token, where not simply the count of real tokens before it.
            cache: What attention keeps of the tokens before these, which are not run again. It comes back with these
                added. (What is refused of a cache, such as more tokens than slots, gives NaN where `jit` hides it.)

        Raises:
            TokenError: An id that is no token. (Inside `jit` it cannot be seen, and that example's logits are NaN, in
                a long text at least from there on.)
            ShapeError: Shapes that do not agree, more tokens than there are learned positions, or a cache that is
                continued past a length where the model's angles change.
        """
        tokens, mask = as_tokens(tokens, mask, self.config)
        if cache is None:
            return _forward(self, tokens, mask, positions)
        cache.check(tokens.shape)
        if other_angles(self.config):
            check_growth(self.config, cache.reach, cache.admit(tokens.shape[-1], mask, positions).reach)
        return _continue(self, tokens, mask, positions, cache)

    def embed(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual stream entering the first block."""
        tokens, mask = as_tokens(tokens, mask, self.config)
        mark = marks(self.config)
        resid = rows(self.W_E, tokens)
        if self.config.embed_scale != 1.0:
            resid = resid * jnp.asarray(self.config.embed_scale, resid.dtype)
        if self.ln_embed is not None:
            resid = self.ln_embed(resid, self.config, under(mark, "ln_embed"))
        resid = mark(resid, "embed")
        if self.W_pos is None:
            return resid
        if positions is None:
            positions = count_positions(tokens.shape[-1], mask)
        places = rows(self.W_pos, positions + self.config.position_offset)
        return resid + mark(jnp.broadcast_to(places, resid.shape), "pos_embed")

    def arrange(
        self,
        n_pos: int,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> Sequence:
        """Where the tokens stand, as every block needs it."""
        return arrange(self.config, n_pos, mask, positions)

    def block(
        self,
        resid: Float[Array, "*batch pos d_model"],
        layer: Int[Array, ""] | int,
        sequence: Sequence,
        mark: Mark | None = None,
        cache: Keys | None = None,
    ) -> Float[Array, "*batch pos d_model"]:
        """The residual stream after block `layer`, which may be traced; another `mark` may change what it names.

        With a cache, keys are its slots; the cache that they would make is dropped.
        """

        def run(kind: int | None, resid: Array) -> Array:
            block, here = self.of_kind(layer, kind)
            return block(resid, sequence, here, layer, self.config, cache, mark)[0]

        if not self.config.mixed:
            return run(None, resid)
        kinds = jnp.array(kinds_of(self.config), jnp.int32)
        return lax.switch(kinds[layer], [partial(run, kind) for kind in range(2)], resid)

    def of_kind(self, layer: Int[Array, ""] | int, kind: int | None) -> tuple[Block, Varying]:
        """The weights of one layer, which may be traced, and what else is its own.

        Args:
            layer: The layer.
            kind: In a model that mixes MLPs (0) and experts (1), whose stacks are apart, which the layer has.
        """
        here = _at(varying(self.config), layer)
        if not self.config.mixed:
            return _at(self.blocks, layer), here
        which, name = kinds_of(self.config), ("mlp", "moe")[kind or 0]
        rank = jnp.array([which[:i].count(kind or 0) for i in range(len(which))], jnp.int32)[layer]
        others = eqx.tree_at(lambda b: (b.mlp, b.moe), self.blocks, (None, None), is_leaf=lambda x: x is None)
        own = _at(getattr(self.blocks, name), rank)
        block = eqx.tree_at(lambda b: getattr(b, name), _at(others, layer), own, is_leaf=lambda x: x is None)
        return block, here

    def proceed(
        self,
        tokens: Int[Array, "*batch pos"],
        cache: Cache,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        positions: Int[Array, "*batch pos"] | None = None,
    ) -> tuple[Float[Array, "*batch pos d_model"], Cache]:
        """The final residual stream, not unembedded, of tokens that follow those in the cache; and the cache."""
        n_pos, before = tokens.shape[-1], cache.reach
        cache = cache.admit(n_pos, mask, positions)
        resid = self.embed(tokens, mask=mask, positions=cache.next(cache.positions, n_pos))
        sequence = arrange(self.config, n_pos, mask, positions, cache)

        resid, cache = through(self, resid, sequence, cache)
        fits = cache.length + n_pos <= cache.n_slots
        if other_angles(self.config):
            fits = fits & ~outgrows(self.config, before, cache.reach)[..., None, None]
        return jnp.where(fits, resid, jnp.nan).astype(resid.dtype), cache.advance(n_pos)

    def unembed(
        self, resid: Float[Array, "*batch pos d_model"], start: int = 0
    ) -> Float[Array, "*batch pos d_vocab"]:
        """Logits of a final residual stream: the last norm, where there is one, then the unembedding.

        Its first position is the text's `start`.
        """
        config, mark = self.config, marks(self.config, start)
        normalized = resid if self.ln_final is None else self.ln_final(resid, config, under(mark, "ln_final"))
        normalized = over_examples(normalized)
        if self.W_U is not None:
            logits = contract("...m,mv->...v", normalized, self.W_U, config)
        elif normalized.size <= _FEW * config.d_model:
            logits = jnp.moveaxis(contract("vm,...m->v...", self.W_E, normalized, config), 0, -1)
        else:
            logits = contract("...m,vm->...v", normalized, self.W_E, config)
        if self.b_U is not None:
            logits = logits + self.b_U
        return mark(scaled(logits, config), "logits")


def scaled(logits: Float[Array, "..."], config: Config) -> Float[Array, "..."]:
    """Logits times the config's factor, and soft-capped."""
    if config.logit_scale != 1.0:
        logits = config.logit_scale * logits
    if config.final_softcap is not None:
        logits = config.final_softcap * jnp.tanh(logits / config.final_softcap)
    return logits


@eqx.filter_jit
def _forward(model: Decoder, tokens: Array, mask: Array | None, positions: Array | None) -> Array:
    resid = model.embed(tokens, mask=mask, positions=positions)
    sequence = model.arrange(tokens.shape[-1], mask=mask, positions=positions)

    return model.unembed(through(model, resid, sequence)[0])


@eqx.filter_jit
def _continue(
    model: Decoder, tokens: Array, mask: Array | None, positions: Array | None, cache: Cache
) -> tuple[Array, Cache]:
    resid, cache = model.proceed(tokens, cache, mask=mask, positions=positions)
    return model.unembed(resid), cache


def through(model: Decoder, resid: Array, sequence: Sequence, cache: Any = None) -> tuple[Array, Any]:
    """The residual stream after all blocks, and the cache, if there is one."""

    def step(carry: tuple[Array, Any], block: Block, here: Varying, layer: Array) -> tuple[Array, Any]:
        return block(carry[0], sequence, here, layer, model.config, carry[1])

    return over_blocks(model, step, (resid, cache))


def over_blocks(model: Decoder, step: Callable[[Any, Block, Varying, Array], Any], carry: Any) -> Any:
    """`carry = step(carry, block, here, layer)` for every block in turn: what differs in kind is compiled once each.

    Weights are scanned, which gradients need; where layers differ in kind, each segment scans the layer counter alone.
    """
    config = model.config
    if not config.mixed:
        xs = (model.blocks, varying(config), jnp.arange(config.n_layers, dtype=jnp.int32))
        return lax.scan(lambda carry, x: (step(carry, *x), None), carry, xs)[0]
    for segment in segments(kinds_of(config)):
        pattern, first = segment.kinds, segment.start

        def repeat(
            carry: Any, at: Array, pattern: tuple[int, ...] = pattern, first: int = first
        ) -> tuple[Any, None]:
            for i, kind in enumerate(pattern):
                layer = first + len(pattern) * at + i
                carry = step(carry, *model.of_kind(layer, kind), layer)
            return carry, None

        carry, _ = lax.scan(repeat, carry, jnp.arange(segment.repeats, dtype=jnp.int32))
    return carry


def _at(stacked: Any, layer: Array | int) -> Any:
    """One layer of stacked arrays."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked)


def as_tokens(
    tokens: Tokens, mask: Bool[Array, "*batch pos"] | None, config: ModelConfig
) -> tuple[Int[Array, "*batch pos"], Bool[Array, "*batch pos"] | None]:
    """Ids and mask as arrays, checked as far as they can be seen, for a model of any structure."""
    if config.reads_pixels:
        raise ArgumentError(
            "This model reads images, and this needs a model of tokens. `mj.capture` and `mj.intervene(model, "
            "mj.replace(site, value, layer=3, pos=pos))` work on any model, and `jax.vmap` over `pos` sweeps."
        )
    if isinstance(tokens, Prompts):
        mask = tokens.mask if mask is None else mask
        tokens = tokens.tokens
    if not isinstance(tokens, Array):
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise ShapeError(
                "Token lists of different lengths make no array. Pad them and pass `mask=`, or let the tokenizer do "
                "it: `tokenizer([text, ...])` gives Prompts."
            ) from None
        tokens = tokens.astype(np.int32) if tokens.size == 0 else tokens
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise TokenError(
            f"Token ids must be integers, got {tokens.dtype}. Text goes through the tokenizer first."
        )
    if tokens.ndim == 0 or tokens.shape[-1] == 0:
        raise ShapeError(
            f"Token ids need a shape (*batch, pos) with at least one position, got {tokens.shape}."
        )
    if isinstance(config, Config) and config.positions == "learned" and tokens.shape[-1] > config.n_ctx:
        raise ShapeError(
            f"{tokens.shape[-1]} tokens, but the model has {config.n_ctx} learned positions (`n_ctx`): shorten "
            "the prompts."
        )
    if mask is not None and mask.shape != tokens.shape:
        raise ShapeError(f"`mask` has shape {mask.shape}, tokens have {tokens.shape}: they must be equal.")
    if not isinstance(tokens, Tracer):
        ids, d_vocab = whole(tokens), config.letters["v"]
        real = True if mask is None or isinstance(mask, Tracer) else whole(mask, bool)
        wrong = ids[((ids < 0) | (ids >= d_vocab)) & real]
        if wrong.size:
            raise TokenError(
                f"Token id {int(wrong[0])} is out of range: the model has {d_vocab} tokens, 0 to "
                f"{d_vocab - 1}. Were these ids made by another model's tokenizer?"
            )
    tokens = jnp.asarray(tokens, jnp.int32)
    if mask is None:
        return tokens, None
    mask = jnp.asarray(mask, bool)
    return jnp.where(mask, tokens, 0), mask  # padding may be any id, none of which may reach a real position
