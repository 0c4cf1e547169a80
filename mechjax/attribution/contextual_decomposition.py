"""Contextual decomposition (CD-T). What share of the logits comes from this node, by whatever way?

Every activation of the clean run is split in two, h = beta + gamma. At the source beta = w_u - a_u and gamma = a_u;
before it beta = 0; after it both are passed on by the rules of `mechjax.attribution.shares`: weights act on each and
biases are shared as their sizes; norms divide by the scale of the whole; attention patterns are those of the run; an
activation function gives gamma' = f(gamma) and beta' = f(beta + gamma) - f(gamma); where the two have opposite signs,
all goes to the larger.

    score[u] = m(beta + gamma at the logits) - m(gamma at the logits)

Reference: Hsu et al. (2024), "Efficient automated circuit discovery in transformers using contextual decomposition",
arXiv:2407.00886; Murdoch et al. (2018), arXiv:1801.05453, for the rules' origin.
Differs from the paper: any ablation at the source, where it takes means; signs are settled (`settle`) at what heads
mix, at what attention and MLPs write and at the stream, as in the authors' code for BERT; products of a gated MLP
follow the rule of activation functions; the unembedding's bias is gamma's.
Cost: a forward for each side, and for each node two without scores, from its layer on. Memory: `chunk_size` nodes
at a time.
Exact: beta + gamma is the activation, everywhere. As an ablation: never, but where patterns and scales do not change
and there is nothing between source and logits that bends.    Misleads when: the node acts by moving attention.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mechjax.attribution.same import seen_apart
from mechjax.attribution.scores import Reduce, Scores, reduced
from mechjax.attribution.shares import Shares, affine, normalised
from mechjax.attribution.subject import Ablation, Subject, subject
from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.base.meshes import on_any_mesh
from mechjax.graph.build import Graph
from mechjax.metrics.metric import Metric
from mechjax.models.block import Block
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder, over_blocks
from mechjax.models.mlp import ACTIVATIONS, MLP
from mechjax.models.needs import needs_decoder
from mechjax.models.positions import Varying
from mechjax.models.resume import resume
from mechjax.models.room import at_once, backs_off
from mechjax.models.scores import mix
from mechjax.transform.transforms import capture

CHUNK_BYTES = 256e6

Frozen = tuple[Array, Array, Array | None]
"""Of the clean run: the stream that enters each layer, attention patterns, and what the norm after attention divides
by, if there is one."""


@needs_decoder("decompose")
@on_any_mesh
@backs_off
def contextual_decomposition(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    ablation: Ablation = "resample",
    reference: Any = None,
    settle: bool = True,
    reduce: Reduce = "mean",
    chunk_size: int | None = None,
) -> Scores:
    """Score every node by the share of the logits that comes from it.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`: one number per example.
        graph: The model's graph, `mj.graph.build(model)`.
        ablation: What of a node's write is not its own, as in `eap`; the paper's is "mean_per_pos".
        reference: The prompts of a mean.
        settle: Whether shares of opposite signs are given to the larger.
        reduce: How examples become one number, as in `eap`.
        chunk_size: Nodes that run at once; None plans it from their memory.

    Returns:
        The scores, in the order of `graph.nodes`: `.compare(exact(..., over="node"))` says how good they are.

    Raises:
        UnsupportedModelError: Experts or latent attention, for which there are no rules.
        ArgumentError: An argument outside its range, or a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
    """
    config = model.config
    if config.experts is not None or config.latent is not None:
        found = "mixtures of experts" if config.latent is None else "latent attention"
        raise UnsupportedModelError(
            f"contextual decomposition has no rule for {found}; gradients (eap) and exact scores work for this model."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one node must run at once.")
    graph = graph.whole("contextual_decomposition")
    given = subject(model, clean, corrupt, metric, graph, ablation, reference, reduce)
    per_token = 8 * (config.d_mlp + 3 * config.d_model + 3 * config.n_heads * config.d_head)
    size = per_token * given.start[..., 0].size * given.start.dtype.itemsize
    chunk = min(chunk_size or at_once(CHUNK_BYTES, size), len(graph.nodes))
    base, effect = _of_nodes(given, len(graph.nodes), settle, chunk, ablation == "resample")
    return Scores(
        reduced(effect.T, reduce),
        base,
        graph,
        ("node",),
        "contextual_decomposition",
        ablation,
        reduce,
    )


@eqx.filter_jit
def _of_nodes(given: Subject, n_nodes: int, settle: bool, chunk: int, resampled: bool) -> tuple[Array, Array]:
    """The metric, and for each node what it loses without the node's share."""
    model = given.model
    apart = seen_apart(given.start, given.ablated.input, model.config) if resampled else None
    last, frozen = capture_frozen(given)
    without = eqx.tree_at(lambda m: m.ln_final, model, None, is_leaf=lambda part: part is None)
    n_own = (n_nodes - 1) // model.config.n_layers

    def nodes(held: Array) -> Array:
        first = jnp.maximum(jnp.argmax(held.any(0)) - 1, 0) // n_own  # layer of the first of them

        def node(held: Array) -> Array:
            shares = decomposed(given, frozen, held, settle, first.astype(jnp.int32), apart)
            ends = normalised(shares, model.ln_final, model.config)
            return given.measured.of(without, ends.total) - given.measured.of(without, ends.rest)

        return jax.vmap(node)(held)

    n = -(-n_nodes // chunk)
    filled = jnp.eye(n * chunk, n_nodes, dtype=bool).reshape(n, chunk, n_nodes)
    found = jax.lax.map(nodes, filled).reshape(n * chunk, -1)[:n_nodes]
    return given.measured.of(model, last), found


def capture_frozen(given: Subject) -> tuple[Array, Frozen]:
    """The clean run's last stream, and what of it keeps still."""
    post = given.model.blocks.ln1_post is not None
    run = capture(resume(given.model, 0).blocks, ["resid_pre", "pattern", *["ln1_post.scale"] * post])
    last, acts = run(given.start, mask=given.mask)
    return last, (acts["resid_pre"], acts["pattern"], acts.arrays.get("ln1_post.scale"))


def decomposed(
    given: Subject,
    frozen: Frozen,
    held: Bool[Array, " node"],
    settle: bool,
    first: Int[Array, ""],
    apart: Bool[Array, "batch pos"] | None = None,
) -> Shares:
    """What the unembedding reads, in shares.

    Args:
        given: Both runs.
        frozen: What of the clean run keeps still.
        held: Which nodes are the source.
        settle: Whether shares of opposite signs are given to the larger.
        first: A layer before which there is no source, so that all is the rest's.
        apart: Where the two runs differ, and nodes so have something of their own; None for everywhere.
    """
    model, config, ablated = given.model, given.model.config, given.ablated
    own = held[1:].reshape(config.n_layers, -1)
    settled = Shares.settled if settle else lambda x: x
    apart = jnp.ones(given.start.shape[:-1], bool) if apart is None else apart
    streams, patterns, scales = frozen

    def through_block(resid: Shares, block: Block, here: Varying, layer: Array) -> Shares:
        first = normalised(resid, block.ln1, config)
        z = settled(_mixed(first, block.attn, patterns[layer], config))
        instead = ablated.heads[layer]
        instead = instead if scales is None else instead * scales[layer][..., None].astype(instead.dtype)
        z = z.given(own[layer, : config.n_heads, None] & apart[..., None, None], instead)
        out = affine("...hd,hdm->...m", z, block.attn.W_O, block.attn.b_O, config)
        attn = settled(_written(out, block.ln1_post, config))
        if block.mlp is None or ablated.mlps is None:
            return settled(resid + attn)
        mid = settled(resid + attn) if config.residual == "serial" else resid
        read = first if config.residual == "parallel_shared" else normalised(mid, block.ln2, config)
        mlp = settled(_written(_through(read, block.mlp, config, settled), block.ln2_post, config))
        mlp = mlp.given(own[layer, -1] & apart[..., None], ablated.mlps[layer])
        return settled(mid + mlp if config.residual == "serial" else resid + attn + mlp)

    def step(resid: Shares, block: Block, here: Varying, layer: Array) -> Shares:
        run = lambda resid: through_block(resid, block, here, layer)
        return jax.lax.cond(layer >= first, run, lambda resid: resid, resid)

    start = Shares(jnp.zeros_like(given.start), streams[first]).given(
        held[0] & apart[..., None], ablated.input
    )
    return over_blocks(model, step, start)


def _mixed(x: Shares, attn: Any, pattern: Array, config: Config) -> Shares:
    """What heads mix of the values, by the pattern of the run."""
    v = affine("...m,mhd->...hd", x, attn.W_V, attn.b_V, config)
    if (clip := config.qkv_clip) is not None:
        v = v.through(lambda part: jnp.clip(part, -clip, clip))
    return v.each(lambda part: mix(pattern, part, config))


def _through(x: Shares, mlp: MLP, config: Config, settled: Any) -> Shares:
    """What the MLP gives, before norm and scale."""
    act = ACTIVATIONS[config.activation]
    linear = settled(affine("...i,io->...o", x, mlp.W_in, mlp.b_in, config))
    if mlp.W_gate is None:
        post = linear.through(act)
    else:
        post = settled(affine("...i,io->...o", x, mlp.W_gate, mlp.b_gate, config)).through(act).times(linear)
    return affine("...i,io->...o", post, mlp.W_out, mlp.b_out, config)


def _written(x: Shares, norm: Any, config: Config) -> Shares:
    """What is added to the stream."""
    x = normalised(x, norm, config)
    return x if config.residual_scale == 1.0 else x.each(lambda part: part * config.residual_scale)
