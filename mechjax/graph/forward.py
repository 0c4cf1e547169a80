"""The masked forward: every reader gets each node's write as it is in this run, or as it is when ablated.

    x_v = sum_u [M[u, v] w_u + (1 - M[u, v]) a_u]

over the nodes u before the reader v. `w_u` is what u writes in this very run (so it changes with the edges cut before
it), `a_u` what it writes when ablated, M is `kept`. Exact edge patching evaluates it, EAP is its gradient at M = 1,
faithfulness evaluates it on many masks (`vmap` over `kept`), and learned masks optimise it.

Where a norm stands after attention, a head's write is its share of the norm's output, at the scale of the run.
Cost: a forward in which every head reads apart, and `node * reader` products of stream vectors. Memory: one stream per
node; gradients keep them for every layer.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from mechjax.graph.build import Graph
from mechjax.graph.tap import READS, tapped
from mechjax.graph.writes import Writes, head_vectors
from mechjax.models.block import Block
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, Tokens, as_tokens, over_blocks
from mechjax.models.marks import marks_of
from mechjax.models.positions import Varying
from mechjax.transform.context import wanting


def masked_forward(
    model: Decoder,
    tokens: Tokens,
    kept: Float[Array, " edge"],
    ablated: Writes,
    *,
    graph: Graph,
    mask: Bool[Array, "*batch pos"] | None = None,
) -> Float[Array, "*batch pos d_vocab"]:
    """Logits of a run in which edges are cut.

    Args:
        model: The decoder.
        tokens: Prompts.
        kept: 1 for each edge that carries what its node writes, 0 for each that carries the ablated write, anything
            between for a mixture; in the order of `graph.edges`.
        ablated: What nodes write when ablated, such as `mj.graph.writes(model, corrupt)`; shaped as the run.
        graph: The model's graph.
        mask: True for real tokens.

    Raises:
        ArgumentError: The graph of another model.
        ShapeError: A mask with another number of edges.
    """
    ids, mask = as_tokens(tokens, mask, model.config)
    return _logits(model, ids, kept, ablated, graph, mask)


@eqx.filter_jit
def _logits(
    model: Decoder, ids: Array, kept: Array, ablated: Writes, graph: Graph, mask: Array | None
) -> Array:
    resid = masked_stream(model, model.embed(ids, mask=mask), kept, ablated, graph=graph, mask=mask)
    return model.unembed(resid)


def masked_stream(
    model: Decoder,
    start: Float[Array, "*batch pos d_model"],
    kept: Float[Array, " edge"],
    ablated: Writes,
    *,
    graph: Graph,
    mask: Bool[Array, "*batch pos"] | None = None,
) -> Float[Array, "*batch pos d_model"]:
    """What the unembedding reads in a run in which edges are cut, from what enters the first block.

    Arguments and errors as in `masked_forward`.
    """
    model = graph.view(model)
    config, n_nodes = model.config, len(graph.nodes)
    sequence = model.arrange(start.shape[-2], mask=mask)
    cut = (1 - graph.square(kept)).astype(start.dtype)
    per_layer = jnp.moveaxis(cut[:, :-1].reshape(n_nodes, graph.n_layers, -1), 1, 0)

    def step(carry: tuple[Array, Array], block: Block, here: Varying, layer: Array) -> tuple[Array, Array]:
        resid, moved = carry
        seen: dict[str, Array] = {}
        edges = dict(
            zip(graph.reads, _split(_row(per_layer, layer), tuple(graph.reads.values())), strict=True)
        )

        def with_heads() -> Array:
            z = seen["z"]
            if block.ln1_post is not None:
                z = z / seen["ln1_post.scale"][..., None].astype(z.dtype)
            heads = head_vectors(block.attn.W_O, block.ln1_post, _row(ablated.heads, layer) - z, config)
            return _put(moved, jnp.moveaxis(heads, -2, 0), 1 + layer * graph.n_writers)

        def read_apart(name: str) -> Any:
            return lambda x: x + contract("u...m,uh->...hm", moved, edges[name], config)

        def read_mlp(x: Array) -> Array:
            others = with_heads() if graph.serial else moved
            return x + contract("u...m,u->...m", others, edges["mlp_in"][:, 0], config)

        changes = {name: read_apart(name) for name in ("q_input", "k_input", "v_input")} | {
            "mlp_in": read_mlp
        }
        mark = tapped(marks_of(layer, config), changes, seen)
        resid, _ = block(resid, sequence, here, layer, config, mark=mark)
        moved = with_heads()
        if ablated.mlps is not None:
            own = (_row(ablated.mlps, layer) - seen["mlp_out"])[None]
            moved = _put(moved, own, 1 + layer * graph.n_writers + graph.n_heads)
        return resid, moved

    moved = jnp.zeros((n_nodes, *start.shape), start.dtype).at[0].set(ablated.input - start)
    with wanting(READS):
        resid, moved = over_blocks(model, step, (start, moved))
    return resid + contract("u...m,u->...m", moved, cut[:, -1], config)


def _row(stacked: Array, layer: Array) -> Array:
    return lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _put(rows: Array, new: Array, at: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(rows, new, at, 0)


def _split(columns: Array, sizes: tuple[int, ...]) -> list[Array]:
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
    return jnp.split(columns, ends, axis=-1)
