"""Mamba (Gu and Dao 2023, arXiv:2312.00752) and Mamba-2 (Dao and Gu 2024, arXiv:2405.21060): no attention, no MLP.

Every layer adds one mixer's output to the residual stream, `resid_post = resid_pre + mixer_out`, and tokens hear of
earlier ones through the mixer's convolution and its states alone. The state after every token is a site, `state`. It
is formed only when somebody asks for it; then the layer runs token by token, and what an edit puts there is what is
read at that position and what all later states are made of.

Cost: linear in the number of tokens; asked for states, a step per token that cannot run beside others. Methods that
need attention, MLPs or the decoder's parts need a decoder.
"""

from collections.abc import Mapping
from typing import Any, overload

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.meshes import on_any_mesh
from mechjax.models.contraction import contract
from mechjax.models.decoder import Tokens, as_tokens
from mechjax.models.embedding import rows
from mechjax.models.mamba2_mixer import Mamba2Mixer
from mechjax.models.mamba_config import MambaConfig
from mechjax.models.mamba_mixer import MambaMixer
from mechjax.models.marks import marks, marks_along, marks_of, under
from mechjax.models.norms import Norm
from mechjax.models.state_cache import StateCache
from mechjax.models.unhashed import Unhashed
from mechjax.parallel.examples import over_examples


class MambaBlock(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    ln1: Norm
    mixer: MambaMixer | Mamba2Mixer

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        mask: Bool[Array, "*batch pos"] | None,
        cache: StateCache,
        layer: Int[Array, ""] | int,
        config: MambaConfig,
    ) -> tuple[Float[Array, "*batch pos d_model"], StateCache]:
        """The residual after this block and the layer's cache; `self` and `cache` are one layer's."""
        mark = marks_of(layer, config)
        resid = mark(resid, "resid_pre")
        read = mark(resid, "mixer_in").astype(self.mixer.W_O.dtype)
        read = self.ln1(read, config, under(mark, "ln1"))
        named = marks_along(layer, config, "pos", resid.shape[-2])
        out, cache = self.mixer(read, mask, cache, config, mark, lambda state, t: named(state, "state", t))
        return mark(resid + out.astype(resid.dtype), "resid_post"), cache


class Mamba(Unhashed):
    """A state space model. A pytree with a pure `__call__`: `model(tokens) -> logits`.

    Attributes:
        W_E: Embedding; where `tied`, also the unembedding.
        blocks: All blocks, every parameter with a leading layer axis.
        ln_final: The last norm.
        W_U: Unembedding; None where tied.
        config: The choices.
    """

    W_E: Float[Array, "d_vocab d_model"]
    blocks: MambaBlock
    ln_final: Norm
    W_U: Float[Array, "d_model d_vocab"] | None
    config: MambaConfig = eqx.field(static=True)

    @overload
    def __call__(
        self, tokens: Tokens, *, mask: Bool[Array, "*batch pos"] | None = None, cache: None = None
    ) -> Float[Array, "*batch pos d_vocab"]: ...

    @overload
    def __call__(
        self, tokens: Tokens, *, mask: Bool[Array, "*batch pos"] | None = None, cache: StateCache
    ) -> tuple[Float[Array, "*batch pos d_vocab"], StateCache]: ...

    @on_any_mesh
    def __call__(
        self,
        tokens: Tokens,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
        cache: StateCache | None = None,
    ) -> Any:
        """Logits of the next token at every position, of shape (*batch, pos, d_vocab); with a cache, `(logits, cache)`.

        Args:
            tokens: Prompts (whose mask is then used), integer ids of shape (*batch, pos), or nested lists of them.
            mask: True for real tokens. Padding, wherever it stands, changes no real position: convolutions pass over
                it, and states stay as they are.
            cache: What the mixers keep of the tokens before these, which are not run again. It comes back with these
                added.

        Raises:
            TokenError: An id that is no token. (Inside `jit` it cannot be seen, and that example's logits are NaN, at
                least from there on.)
            ShapeError: Shapes that do not agree.
        """
        tokens, mask = as_tokens(tokens, mask, self.config)
        if cache is None:
            return _forward(self, tokens, mask)
        cache.check(tokens.shape)
        return _continue(self, tokens, mask, cache)

    def embed(self, tokens: Int[Array, "*batch pos"]) -> Float[Array, "*batch pos d_model"]:
        """The residual stream entering the first block."""
        embedded = rows(self.W_E, tokens)
        embedded = marks(self.config)(embedded, "embed")
        wide = self.config.residual_float32 and jnp.finfo(embedded.dtype).bits < 32
        return embedded.astype(jnp.float32) if wide else embedded

    def proceed(
        self,
        tokens: Int[Array, "*batch pos"],
        cache: StateCache,
        *,
        mask: Bool[Array, "*batch pos"] | None = None,
    ) -> tuple[Float[Array, "*batch pos d_model"], StateCache]:
        """The residual stream leaving the last block and the cache with these tokens, which were checked."""

        def step(resid: Array, xs: tuple[MambaBlock, StateCache, Array]) -> tuple[Array, StateCache]:
            block, kept, layer = xs
            return block(resid, mask, kept, layer, self.config)

        layers = jnp.arange(self.config.n_layers, dtype=jnp.int32)
        return lax.scan(step, self.embed(tokens), (self.blocks, cache, layers))

    def unembed(self, resid: Float[Array, "*batch pos d_model"]) -> Float[Array, "*batch pos d_vocab"]:
        """Logits of a final residual stream: the last norm, then the unembedding."""
        mark = marks(self.config)
        normalized = self.ln_final(resid, self.config, under(mark, "ln_final")).astype(self.W_E.dtype)
        normalized = over_examples(normalized)
        if self.W_U is None:
            return mark(contract("...m,vm->...v", normalized, self.W_E, self.config), "logits")
        return mark(contract("...m,mv->...v", normalized, self.W_U, self.config), "logits")


@eqx.filter_jit
def _forward(model: Mamba, tokens: Array, mask: Array | None) -> Array:
    lead, dtype = tokens.shape[:-1], model.W_E.dtype
    one = jax.tree.map(lambda x: x[0], StateCache.empty(model.config, lead, dtype))

    def step(resid: Array, xs: tuple[MambaBlock, Array]) -> tuple[Array, None]:
        block, layer = xs
        return block(resid, mask, one, layer, model.config)[0], None

    layers = jnp.arange(model.config.n_layers, dtype=jnp.int32)
    return model.unembed(lax.scan(step, model.embed(tokens), (model.blocks, layers))[0])


@eqx.filter_jit
def _continue(model: Mamba, tokens: Array, mask: Array | None, cache: StateCache) -> tuple[Array, StateCache]:
    resid, cache = model.proceed(tokens, cache, mask=mask)
    return model.unembed(resid), cache


def assemble_mamba(config: MambaConfig, params: Mapping[str, Any]) -> Mamba:
    """A model that holds `params`, whose paths and shapes are those of `config.shapes`."""

    def build(module: type[eqx.Module], prefix: str, **parts: Any) -> Any:
        names = module.__dataclass_fields__.keys() - parts
        return module(**{name: params.get(f"{prefix}{name}") for name in names}, **parts)

    if config.in_heads:
        mixer = build(Mamba2Mixer, "blocks.mixer.", norm=build(Norm, "blocks.mixer.norm."))
    else:
        mixer = build(MambaMixer, "blocks.mixer.")
    blocks = MambaBlock(ln1=build(Norm, "blocks.ln1."), mixer=mixer)
    return build(Mamba, "", blocks=blocks, ln_final=build(Norm, "ln_final."), config=config)
