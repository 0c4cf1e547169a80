"""Who reads a residual stream, as linear functions of it: norms at the scales and heads with the patterns of one run.

    latent: C(w * W_enc)        head: C(w * W_V W_O d)        skip: C(w * W_skip d)

are what is read (`direction`), of weights alone; d is what reads the stream after that head or MLP, C takes the mean
away where norms are LayerNorms, w is the norm's weight. How strongly, `gain`, is of the run: 1 over the scales of the
norms on the way, times the patterns of the heads. Biases on the way, of norms and of what reads them, are `bias`.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mechjax.attribution.transcoders import Transcoders, entry
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, through
from mechjax.models.norms import Norm
from mechjax.transform.transforms import capture


class Linear(eqx.Module):
    """A norm of one layer at scale 1, or none: what it does to vectors, and, backwards, to what reads it.

    Attributes:
        w: What it multiplies by; None for nothing.
        b: What it adds; None for nothing.
        centres: Whether it takes the mean away (static).
        eps: What it adds to the variance; None where there is no norm (static).
    """

    w: Float[Array, " d_model"] | None = None
    b: Float[Array, " d_model"] | None = None
    centres: bool = eqx.field(static=True, default=False)
    eps: float | None = eqx.field(static=True, default=None)

    def scale(self, x: Float[Array, "*place d_model"], given: Array | None) -> Float[Array, "*#place 1"]:
        """What the norm would divide vectors by, or what is given in place of it; 1 where there is no norm."""
        if self.eps is None or given is not None:
            held = jnp.ones((), x.dtype) if self.eps is None or given is None else given
            return jnp.broadcast_to(held, (*x.shape[:-1], 1))
        centred = x - x.mean(-1, keepdims=True) if self.centres else x
        return jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)

    def forth(self, x: Float[Array, "*place d_model"]) -> Float[Array, "*place d_model"]:
        """What it gives for vectors, less its bias."""
        x = x - x.mean(-1, keepdims=True) if self.centres else x
        return x if self.w is None else x * self.w

    def back(self, reader: Float[Array, " d_model"]) -> Float[Array, " d_model"]:
        """What of the stream is read by what reads its output along `reader`."""
        reader = reader if self.w is None else reader * self.w
        return reader - reader.mean() if self.centres else reader

    def bias(self, reader: Float[Array, " d_model"]) -> Float[Array, ""]:
        """What its own bias gives that reader."""
        return jnp.zeros((), reader.dtype) if self.b is None else (self.b * reader).sum()


class Reading(eqx.Module):
    """A linear function of the stream at one position, of one example: `gain * stream . direction + bias`.

    Attributes:
        direction: What it reads, of weights alone.
        gain: How strongly, in this run.
        bias: What is added whatever the stream holds.
        at: The position.
        n_attn: How many layers' attention has written to that stream.
        n_mlp: How many layers' MLPs have.
    """

    direction: Float[Array, " d_model"]
    gain: Float[Array, ""]
    bias: Float[Array, ""]
    at: Int[Array, ""]
    n_attn: Int[Array, ""]
    n_mlp: Int[Array, ""]


class Run(eqx.Module):
    """What is recorded of a run: of one example, or, with a leading axis, of a batch.

    Attributes:
        embed: What token embeddings write.
        pos_embed: What position embeddings write; None without.
        values: What heads move.
        pattern: Where they look.
        mlp_out: What MLPs write.
        read: What transcoders read.
        read_scale: What the norm before that divides by; None where there is none.
        attn_scale: What the norm before attention divides by.
        post_scale: What the norm after attention divides by.
    """

    embed: Float[Array, "*batch pos d_model"]
    pos_embed: Float[Array, "*batch pos d_model"] | None
    values: Float[Array, "*batch layer pos kv_head d_value"]
    pattern: Float[Array, "*batch layer head query key"]
    mlp_out: Float[Array, "*batch layer pos d_model"]
    read: Float[Array, "*batch layer pos d_model"]
    read_scale: Float[Array, "*batch layer pos one"] | None
    attn_scale: Float[Array, "*batch layer pos one"] | None
    post_scale: Float[Array, "*batch layer pos one"] | None


class _Streams(eqx.Module):
    """The model without its unembedding."""

    model: Decoder

    def __call__(self, ids: Array, mask: Array | None) -> Array:
        sequence = self.model.arrange(ids.shape[-1], mask=mask)
        return through(self.model, self.model.embed(ids, mask=mask), sequence)[0]


class Reads(eqx.Module):
    """A model and its transcoders: runs of it, and who reads its streams.

    Where a method takes a run, None stands for weights alone: scales of 1, and heads that look nowhere else.

    Attributes:
        model: The decoder.
        transcoders: Its transcoders.
    """

    model: Decoder
    transcoders: Transcoders

    @property
    def dtype(self) -> Any:
        """Of everything that is summed: float32 at least."""
        kinds = (self.model.W_E.dtype, self.transcoders.stack.W_enc.dtype, jnp.dtype(jnp.float32))
        return max(kinds, key=lambda kind: (kind.itemsize, kind == jnp.float32))

    @property
    def read_norm(self) -> str:
        """The norm through which transcoders read; empty where they read the stream as it is."""
        name = "ln1" if self.model.config.residual == "parallel_shared" else "ln2"
        there = self.transcoders.reads == "ln2.normalized" and getattr(self.model.blocks, name) is not None
        return name if there else ""

    def record(self, ids: Int[Array, "batch pos"], mask: Bool[Array, "batch pos"] | None) -> Run:
        """A run of prompts."""
        blocks, norm = self.model.blocks, self.read_norm
        stream = "resid_mid" if self.model.config.residual == "serial" else "resid_pre"
        names = {
            "embed": "embed", "pos_embed": "pos_embed" if self.model.W_pos is not None else "", "values": "v",
            "pattern": "pattern", "mlp_out": "mlp_out", "read": f"{norm}.normalized" if norm else stream,
            "read_scale": f"{norm}.scale" if norm else "", "attn_scale": "ln1.scale" if blocks.ln1 is not None else "",
            "post_scale": "ln1_post.scale" if blocks.ln1_post is not None else "",
        }  # fmt: skip
        acts = capture(_Streams(self.model), sorted({name for name in names.values() if name}))(ids, mask)[1]

        def of(name: str) -> Any:
            if not name:
                return None
            x = acts[name].astype(self.dtype)
            return x if acts.layers[name] is None else jnp.moveaxis(x, 1, 0)

        return Run(**{field: of(name) for field, name in names.items()})

    def latent(
        self, run: Run | None, layer: Int[Array, ""], feature: Int[Array, ""], at: Int[Array, ""]
    ) -> Reading:
        """What a latent reads: its pre-activation. NaN at a position that there is not."""
        vector, bias = self.transcoders.encoder(layer, feature, self.model.config, self.dtype)
        gain = jnp.ones((), self.dtype)
        if run is not None:
            gain = jnp.where((at >= 0) & (at < run.embed.shape[0]), gain, jnp.nan)
        found = self.mlp(run, vector, gain, layer, at)
        return eqx.tree_at(lambda r: r.bias, found, found.bias + bias)

    def measured(
        self, run: Run, layer: Int[Array, ""], feature: Int[Array, ""], at: Int[Array, ""]
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """What the encoder gives for a latent, and the latent."""
        vector, bias = self.transcoders.encoder(layer, feature, self.model.config, self.dtype)
        z = contract("m,m->", entry(run.read, layer, at), vector, self.model.config) + bias
        return z, self.transcoders.of_latent(self.active(run, at), layer, feature)

    def active(self, run: Run, at: Int[Array, ""]) -> Float[Array, "transcoder feature"]:
        """The latents at a position."""
        return self.transcoders.encode(run.read[jnp.array(self.transcoders.layers), at]).astype(self.dtype)

    def mlp(
        self,
        run: Run | None,
        reader: Float[Array, " d_model"],
        gain: Float[Array, ""],
        layer: Int[Array, ""],
        at: Int[Array, ""],
    ) -> Reading:
        """What is read of the stream by `gain` times something that reads what transcoders of a layer are given."""
        norm, scale = self.norm(self.read_norm, layer), None if run is None else run.read_scale
        n_attn = layer + (1 if self.model.config.residual == "serial" else 0)
        over = gain / _scale(scale, layer, at, self.dtype)
        return Reading(norm.back(reader), over, gain * norm.bias(reader), at, n_attn, layer)

    def skip(self, run: Run | None, reading: Reading, layer: Int[Array, ""]) -> Reading:
        """What is read of the stream through `W_skip` of a layer."""
        reader = self.transcoders.skipped(layer, reading.direction, self.model.config)
        return self.mlp(run, reader, reading.gain, layer, reading.at)

    def head(
        self,
        run: Run | None,
        reading: Reading,
        layer: Int[Array, ""],
        head: Int[Array, ""],
        source: Int[Array, ""],
    ) -> Reading:
        """What is read of the stream at `source` through a head that looks there; of a later head nothing."""
        gain = reading.gain
        if run is not None:
            gain = gain * entry(run.pattern, layer, head, reading.at, source)
            gain = gain / _scale(run.post_scale, layer, reading.at, self.dtype)
        before = layer < reading.n_attn
        gain, n_written = jnp.where(before, gain, 0), jnp.where(before, layer, 0)
        vector, bias = self.moved(self.written(reading.direction, layer), layer, head)
        norm, scale = self.norm("ln1", layer), None if run is None else run.attn_scale
        over = gain / _scale(scale, layer, source, self.dtype)
        bias = gain * (norm.bias(vector) + bias)
        return Reading(norm.back(vector), over, bias, source, n_written, n_written)

    def written(self, direction: Float[Array, " d_model"], layer: Int[Array, ""]) -> Float[Array, " d_model"]:
        """What is read of what heads of a layer give, by what reads what is added to the stream."""
        return self.model.config.residual_scale * self.norm("ln1_post", layer).back(direction)

    def moved(
        self, reader: Float[Array, " d_model"], layer: Int[Array, ""], head: Int[Array, ""]
    ) -> tuple[Float[Array, " d_model"], Float[Array, ""]]:
        """What is read of what a head is given, by what reads what it gives; and what its bias gives."""
        attn: Any = self.model.blocks.attn
        config = self.model.config
        shared = head // (config.n_heads // config.n_kv_heads)
        wide = lambda x, *index: entry(x, layer, *index).astype(self.dtype)
        out = contract("dm,m->d", wide(attn.W_O, head), reader, config)
        vector = contract("md,d->m", wide(attn.W_V, slice(None), shared), out, config)
        bias = jnp.zeros((), self.dtype) if attn.b_V is None else (wide(attn.b_V, shared) * out).sum()
        return vector, bias

    def norm(self, name: str, layer: Int[Array, ""]) -> Linear:
        """A norm of a layer; the identity where there is none, or the name is empty."""
        norm: Norm | None = getattr(self.model.blocks, name) if name else None
        if norm is None:
            return Linear()
        config: Config = self.model.config
        w, b = (None if x is None else entry(x, layer).astype(self.dtype) for x in (norm.w, norm.b))
        return Linear(
            None if w is None else w + config.norm_offset, b, config.norm == "layer", config.norm_eps
        )


def _scale(scales: Array | None, layer: Array, at: Array, dtype: Any) -> Float[Array, ""]:
    return jnp.ones((), dtype) if scales is None else entry(scales, layer, at, 0)
