"""De-embeddings. Which tokens does a latent read?

    score[v] = embed(v) . C(w * W_enc[:, j]) / scale

for every token v of the vocabulary: what its embedding adds to the latent's pre-activation. `scale` is what the norm
before the latent would divide by if the stream held that embedding alone, so that with `biases` it is that stream's
pre-activation; or any number, the same for all tokens. Through a head h the stream holds what the head writes where it
looks at nothing but the token:

    score[v] = embed(v) . C(w_m * W_V W_O C(w * W_enc[:, j])) / (scale_m scale)

Reference: Dunefsky, Chlenski and Nanda (2024), "Transcoders find interpretable LLM feature circuits", arXiv:2406.11944,
"de-embeddings".
Differs: the paper's is `scale=1.0` without norms' weights and centring; embeddings of unlike lengths are then ranked
by their length too.
Cost: `d_vocab * d_model` products. Exact: as what the latent reads of that stream.    Misleads when: the latent is of a
later layer: nothing that layers between make of the token is in it.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mechjax.attribution.asked_latent import Head, check_head
from mechjax.attribution.frozen_reads import Linear, Reads
from mechjax.attribution.transcoders import Given, entry, stack_transcoders
from mechjax.base.display import LEADING, as_html
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture


class DeEmbedding(Record):
    """What a latent reads of each token's embedding.

    Attributes:
        scores: What the embedding adds.
        biases: What is added beside it: biases of norms, of the head and of the latent.
        layer: The layer of the latent.
        feature: Its number.
        head: Layer and number of the head between; None for none.
    """

    scores: Float[Array, " d_vocab"]
    biases: Float[Array, " d_vocab"]
    layer: Int[Array, ""]
    feature: Int[Array, ""]
    head: Int[Array, " two"] | None

    @property
    def preactivations(self) -> Float[Array, " d_vocab"]:
        """Of streams that hold one token's embedding, or what the head writes of it, and nothing else."""
        return self.scores + self.biases

    def top(self, n: int = 10, tokenizer: Any = None) -> list[tuple[str, float]]:
        """The `n` tokens with the highest scores, as (token, score): spelled by a tokenizer, or by their number."""
        scores = whole(self.scores, np.float64)
        order = [int(i) for i in np.argsort(-scores, kind="stable")[:n]]
        spell = (lambda i: f"token {i}") if tokenizer is None else (lambda i: tokenizer.decode([i]))
        return [(spell(i), float(scores[i])) for i in order]

    def _repr_html_(self) -> str:
        return as_html(self, self.axis_labels(), self.top(LEADING))


class _Embedding(eqx.Module):
    """The model's embedding alone."""

    model: Decoder

    def __call__(self, ids: Array) -> Array:
        return self.model.embed(ids)


@needs_decoder("transcoders")
@on_any_mesh
def de_embedding(
    model: Decoder,
    transcoders: Given,
    *,
    layer: Any,
    feature: Any,
    head: Head | None = None,
    scale: Float[Array, ""] | float | None = None,
) -> DeEmbedding:
    """Score every token by what a latent reads of its embedding.

    Args:
        model: The decoder.
        transcoders: Layer -> its transcoder, or a cross-layer one, or what `stack_transcoders` made of them.
        layer: The layer of the latent.
        feature: Its number.
        head: Layer and number of a head through which it reads; None for the stream at its own position.
        scale: What norms on the way divide by; None for what they would, of each token by itself.

    Returns:
        The scores, of which `top` gives the highest.

    Raises:
        ArgumentError: A latent or a head that there is not, a scale that is not positive, or transcoders that cannot be
            taken apart.
        ShapeError: More than one latent, or transcoders of another model.
        UnsupportedModelError: A model without MLPs, or a head whose values are not linear in what it is given.
    """
    if scale is not None and jnp.shape(scale) != ():
        raise ShapeError(f"scale= has shape {jnp.shape(scale)}: one number for all norms, or None.")
    if scale is not None and is_concrete(scale) and not float(scale) > 0:
        raise ArgumentError(f"scale={scale}: norms divide by positive numbers.")
    reads = Reads(model, stack_transcoders(model, transcoders))
    latent = reads.transcoders.latent(layer, feature)
    through = None if head is None else check_head(model, head, layer)
    fixed = None if scale is None else jnp.asarray(scale, reads.dtype)
    scores, biases = _scored(reads, latent, through, fixed)
    return DeEmbedding(scores, biases, *latent, None if through is None else jnp.stack(through))


@eqx.filter_jit
def _scored(
    reads: Reads, latent: tuple[Array, Array], head: tuple[Array, Array] | None, given: Array | None
) -> tuple[Array, Array]:
    config, dtype = reads.model.config, reads.dtype
    ids = jnp.arange(config.d_vocab, dtype=jnp.int32)[:, None]
    own = capture(_Embedding(reads.model), "embed")(ids)[1]["embed"][:, 0].astype(dtype)
    beside = jnp.zeros_like(own)
    if head is not None:
        own, beside = _written(reads, own, head, given)
    vector, bias = reads.transcoders.encoder(*latent, config, dtype)
    norm = reads.norm(reads.read_norm, latent[0])
    own, beside = _normed(norm, own, beside, given)
    scores, biases = (contract("vm,m->v", x, vector, config) for x in (own, beside))
    return scores, biases + norm.bias(vector) + bias


def _written(
    reads: Reads, own: Array, head: tuple[Array, Array], given: Array | None
) -> tuple[Float[Array, "d_vocab d_model"], Float[Array, "d_vocab d_model"]]:
    """What a head writes of each token, and what its biases do."""
    (layer, number), config = head, reads.model.config
    attn: Any = reads.model.blocks.attn
    wide = lambda x, *index: entry(x, layer, *index).astype(reads.dtype)
    shared = number // (config.n_heads // config.n_kv_heads)
    norm = reads.norm("ln1", layer)
    own, beside = _normed(norm, own, jnp.zeros_like(own), given)
    beside = beside if norm.b is None else beside + norm.b
    W_V = wide(attn.W_V, slice(None), shared)
    own, beside = (contract("vm,md->vd", x, W_V, config) for x in (own, beside))
    beside = beside if attn.b_V is None else beside + wide(attn.b_V, shared)
    own, beside = (contract("vd,dm->vm", x, wide(attn.W_O, number), config) for x in (own, beside))
    own, beside = _normed(reads.norm("ln1_post", layer), own, beside, given)
    return config.residual_scale * own, config.residual_scale * beside


def _normed(norm: Linear, own: Array, beside: Array, given: Array | None) -> tuple[Array, Array]:
    """Both shares through a norm, at the scale of the whole or at the one that is given; its bias aside."""
    scale = norm.scale(own + beside, given)
    return norm.forth(own) / scale, norm.forth(beside) / scale
