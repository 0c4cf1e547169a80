"""A block of T5's encoder or decoder, and a stack of them under one scan.

What attention, cross-attention and MLP write is all that is added:

    resid_mid   = resid_pre + attn_out
    resid_cross = resid_mid + cross_attn_out        (decoder)
    resid_post  = resid_cross + mlp_out             (encoder: resid_mid + mlp_out)
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.models.cache import Cache
from mechjax.models.marks import marks, marks_of, under
from mechjax.models.mlp import MLP
from mechjax.models.norms import Norm
from mechjax.models.t5_attention import Names, T5Attention, biases
from mechjax.models.t5_config import T5Config
from mechjax.parallel.examples import over_examples


class Text(eqx.Module):
    """Where the tokens of one text stand. Without batch axes where all examples agree.

    Attributes:
        queries: Positions of the tokens that run. Shape (*batch, query).
        keys: Positions of those that they may see. Shape (*batch, key).
        seen: Which of these each sees; None where all. Shape (*batch, query, key).
    """

    queries: Int[Array, "... query"]
    keys: Int[Array, "... key"]
    seen: Bool[Array, "... query key"] | None


KeysValues = tuple[
    Float[Array, "*layer_batch source head d_head"], Float[Array, "*layer_batch source head d_head"]
]
"""Keys and values of cross-attention."""


class Source(eqx.Module):
    """What cross-attention reads: the encoder's output, or the keys and values that were made of it.

    Attributes:
        read: The output, of shape (*batch, source, d_model); or keys and values, of one layer, or of all in a stack.
        real: Which of its tokens are real; None where all. Shape (*batch, source).
    """

    read: Float[Array, "*batch source d_model"] | KeysValues
    real: Bool[Array, "*batch source"] | None


class T5Block(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis; an encoder has no `ln_cross` and `cross`."""

    ln1: Norm
    attn: T5Attention
    ln_cross: Norm | None
    cross: T5Attention | None
    ln2: Norm
    mlp: MLP

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        text: Text,
        bias: Float[Array, "... head query key"],
        layer: Int[Array, ""] | int,
        config: T5Config,
        names: Names,
        source: Source | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "*batch pos d_model"], Cache | None, KeysValues | None]:
        """The residual after this block, the cache, and what cross-attention's keys and values are."""
        resid = names(over_examples(resid), "resid_pre")
        read = names(resid, "attn_in")
        normalized = self.ln1(read, config, under(names, "ln1"))
        q, k, v = self.attn.project("qkv", read, normalized, self.ln1, config, names)
        if cache is not None:
            k, v, cache = cache.extend(layer, k, v)
        out = names(self.attn.mix(q, k, v, bias, text.seen, config, names), "attn_out")
        resid = names(over_examples(resid + out), "resid_mid")
        kept = None
        if self.cross is not None and self.ln_cross is not None and source is not None:
            out, kept = self._crossed(self.cross, self.ln_cross, resid, source, config, names)
            resid = names(over_examples(resid + out), "resid_cross")
        normalized = self.ln2(names(resid, "mlp_in"), config, under(names, "ln2"))
        out = names(self.mlp(normalized, config, names), "mlp_out")
        return names(over_examples(resid + out), "resid_post"), cache, kept

    @staticmethod
    def _crossed(
        cross: T5Attention, norm: Norm, resid: Array, source: Source, config: T5Config, names: Names
    ) -> tuple[Array, KeysValues]:
        """What cross-attention writes, and its keys and values."""
        own = Names(names.mark, f"{names.prefix}cross_")
        read = own(resid, "attn_in")
        normalized = norm(read, config, under(names, "ln_cross"))
        (q,) = cross.project("q", read, normalized, None, config, own)
        if isinstance(source.read, tuple):
            k, v = source.read
        else:
            k, v = cross.project("kv", source.read, source.read, None, config, own)
        seen = None if source.real is None else source.real[..., None, :]
        return own(cross.mix(q, k, v, None, seen, config, own), "attn_out"), (k, v)


class Stack(eqx.Module):
    """An encoder or a decoder.

    Attributes:
        W_rel: Bias of each bucket of distances and head; with a leading layer axis where layers have their own.
        blocks: All blocks, every parameter with a leading layer axis.
        ln_final: The last norm.
        prefix: What the names of its sites begin with (static).
    """

    W_rel: Float[Array, "*layer bucket head"]
    blocks: T5Block
    ln_final: Norm
    prefix: str = eqx.field(static=True)

    def __call__(
        self,
        resid: Float[Array, "*batch pos d_model"],
        text: Text,
        config: T5Config,
        source: Source | None = None,
        cache: Cache | None = None,
        *,
        keeps: bool = False,
    ) -> tuple[Float[Array, "*batch pos d_model"], Cache | None, KeysValues | None]:
        """The stream after all blocks, normed; the cache; cross-attention's keys and values, if it `keeps` them."""
        both_ways = self.blocks.cross is None
        n_layers = self.blocks.ln1.w.shape[0] if self.blocks.ln1.w is not None else 0
        made = lambda W: biases(W, text.queries, text.keys, config, both_ways=both_ways)
        shared = None if config.bias_per_layer else made(self.W_rel)

        def step(carry: tuple[Array, Any], xs: Any) -> tuple[tuple[Array, Any], Any]:
            block, W_rel, kept, layer = xs
            names = Names(marks_of(layer, config, layers=n_layers), self.prefix)
            here = source if kept is None or source is None else Source(kept, source.real)
            bias = made(W_rel) if shared is None else shared
            resid, cache, kept = block(carry[0], text, bias, layer, config, names, here, carry[1])
            return (resid, cache), kept if keeps else None

        own = self.W_rel if config.bias_per_layer else None
        given = source.read if source is not None and isinstance(source.read, tuple) else None
        xs = (self.blocks, own, given, jnp.arange(n_layers, dtype=jnp.int32))
        (resid, cache), kept = lax.scan(step, (resid, cache), xs)
        mark = Names(marks(config), self.prefix)
        return self.ln_final(resid, config, under(mark, "ln_final")), cache, kept
