"""Information-flow routes. Which writes is what a reader reads made of?

    proximity(u -> v) = max(0, |x_v| - |x_v - w_u|)          sums of sizes over d_model, position by position
    importance[u -> v] = proximity(u -> v) / sum over writers u' before v of proximity(u' -> v)

where x_v is what reader v reads and w_u what node u writes. Means over real tokens, then over examples. Importances of
the edges into one reader sum to one; queries, keys and values of a layer read the same stream, so theirs are equal. No
metric, no gradient, no corrupt run.

Reference: Ferrando and Voita (2024), "Information flow routes", arXiv:2403.00824, section 2.
Differs from the paper: edges of the graph of heads and MLPs, as Hanna et al. (arXiv:2403.17806) have them, positions
averaged; the paper takes heads apart by the token that they look at, and follows one prediction. Where a norm stands
after attention, a head's write is its share of the norm's output.
Cost: one forward, and `node * reader` differences of stream vectors.
Exact: as a description of one run.    Misleads about what an ablation would do: what is read need not be used, and two
writes that cancel count as nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.attribution.scores import Scores
from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.graph.agreement import Agreement, agreement
from mechjax.graph.build import Graph
from mechjax.graph.writes import Writes, recorded, sites
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.models.room import at_once, backs_off
from mechjax.tasks.pairing import batched
from mechjax.transform.captured import Activations
from mechjax.transform.transforms import capture

CHUNK_BYTES = 256e6  # differences of streams and writes that are there at once


class InformationFlow(Record):
    """What each reader's input is made of.

    Attributes:
        importance: Of each edge, in the order of `graph.edges`; those into one reader sum to one.
        graph: The graph (static).
    """

    importance: Float[Array, " edge"]
    graph: Graph = eqx.field(static=True)

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """Names of the edges."""
        return {"edge": self.graph.edges}

    def compare(self, exact: Scores, n: int | None = None) -> Agreement:
        """How well importances agree with the sizes of exact scores, of all edges or some, or of any scores of edges.

        Args:
            exact: `exact(...)`, or another record of the same graph's edges.
            n: How many of the exact scores count as large; a tenth of them by default.

        Raises:
            ArgumentError: Scores of another graph, or of nodes.
        """
        if exact.graph != self.graph or exact.over != ("edge",):
            raise ArgumentError(
                f"importances are of the edges of {self.graph!r}; those to compare with are over={exact.over} of "
                f"{exact.graph!r}: compare what was made of the edges of the same graph."
            )
        known = exact.asked
        return agreement(whole(self.importance)[known], np.abs(exact.scores)[known], n)

    def routes(self, threshold: float) -> Bool[Array, " edge"]:
        """The edges that lead to the logits: walked from there down, along importances of `threshold` and above.

        Raises:
            ArgumentError: A threshold outside 0 to 1.
        """
        if not 0 <= threshold <= 1:
            raise ArgumentError(
                f"threshold={threshold}: importances, and so what is asked of them, lie between 0 and 1."
            )
        graph, strong = self.graph, whole(self.importance) >= threshold
        kept = np.zeros(len(graph.table), bool)
        reached = {"logits"}
        for reader in reversed(
            range(len(graph.readers))
        ):  # a reader comes before the readers that it can reach
            if graph.readers[reader] in reached:
                edges = np.flatnonzero((graph.table[:, 1] == reader) & strong)
                kept[edges] = True
                for node in graph.table[edges, 0]:
                    reached |= _inputs(graph, graph.nodes[node])
        return jnp.asarray(kept)


def _inputs(graph: Graph, node: str) -> set[str]:
    """The readers from which a node has what it writes."""
    layer, _, head = node.partition(".h")
    if not head:
        return {node}  # an MLP is its reader; the input reads nothing
    if f"{node}<k>" in graph.readers:
        return {f"{node}<{letter}>" for letter in "qkv"}
    shared = int(head) * graph.n_kv_heads // graph.n_heads
    return {f"{node}<q>", f"{layer}.kv{shared}<k>", f"{layer}.kv{shared}<v>"}


@needs_decoder("graph")
@on_any_mesh
@backs_off
def information_flow(
    model: Decoder, prompts: Any, *, graph: Graph, chunk_size: int | None = None
) -> InformationFlow:
    """How much of what each reader reads comes from each node.

    Args:
        model: The decoder.
        prompts: `Prompts` or ids (batch, pos).
        graph: The model's graph, `mj.graph.build(model)`.
        chunk_size: Tokens that are taken apart at once; None plans it from their memory.

    Returns:
        The importances, in the order of `graph.edges`.

    Raises:
        ArgumentError: The graph of another model, a chunk size below 1, or a run whose activations are not finite.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one token must be taken apart at once.")
    seen = graph.whole("information_flow").view(model)
    ids, mask = as_tokens(batched(prompts), None, model.config)
    acts = _captured(seen, ids, mask)
    chunk = chunk_size or at_once(CHUNK_BYTES, 8 * len(graph.nodes) * model.config.d_model)
    streams = [acts["resid_pre"], *[acts["mlp_in"]] * graph.mlp, acts["resid_post"]]
    found = _importance(
        seen,
        recorded(seen, acts["resid_pre"][0], acts),
        jnp.concatenate(streams),
        mask,
        graph,
        min(chunk, ids.size),
    )
    return InformationFlow(found[_stream_of(graph)[graph.table[:, 1]], graph.table[:, 0]], graph)


@eqx.filter_jit
def _captured(model: Decoder, ids: Array, mask: Array | None) -> Activations:
    """What nodes write, and what readers read."""
    read = ("resid_pre", *("mlp_in",) * (model.config.mlp != "none"))
    last = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    return capture(model, (*read, *sites(model), last))(ids, mask=mask)[1]


def _stream_of(graph: Graph) -> np.ndarray:
    """For each reader the stream that it reads: those of attention, those of MLPs, and the last."""
    of = [layer + graph.n_layers * (site == "mlp_in") for layer in range(graph.n_layers)
          for site, n in graph.reads.items() for _ in range(n)]  # fmt: skip
    return np.array([*of, graph.n_layers * (1 + graph.mlp)])


@eqx.filter_jit
def _importance(
    model: Decoder, sent: Writes, streams: Float[Array, "stream batch pos d_model"], mask: Array | None,
    graph: Graph, chunk: int,
) -> Float[Array, "stream node"]:  # fmt: skip
    """Importances of all nodes in all streams, token by token, averaged."""
    real = jnp.ones(streams.shape[1:3], bool) if mask is None else mask
    counted = real.astype(streams.dtype)
    weight = counted / counted.sum(-1, keepdims=True) / len(counted)
    before = jnp.zeros(len(streams), jnp.int32).at[_stream_of(graph)].set(jnp.array(graph.before, jnp.int32))
    tokens = lambda x, axis: jnp.moveaxis(x.reshape(*x.shape[:axis], -1, 1, *x.shape[axis + 2 :]), axis, 0)

    def token(xs: tuple[Writes, Array, Array]) -> Array:
        nodes = xs[0].vectors(model)[:, 0]

        def of(reads: tuple[Array, Array]) -> Array:
            stream, n = reads
            near = jnp.abs(stream).sum() - jnp.abs(stream - nodes).sum(-1)
            near = jnp.where(jnp.arange(len(nodes), dtype=n.dtype) < n, jnp.maximum(near, 0), 0)
            return near / jnp.maximum(near.sum(), jnp.finfo(near.dtype).tiny)

        return xs[2] * jax.lax.map(of, (xs[1][:, 0], before))

    xs = (sent.mapped(tokens), tokens(streams, 1), weight.reshape(-1))
    return jax.lax.map(token, xs, batch_size=chunk).sum(0)
