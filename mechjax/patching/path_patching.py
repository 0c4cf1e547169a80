"""Path patching. What does one part of a model tell another, directly, and what comes of it?

Two runs of the clean prompts give

    x_v' = what reader v reads where senders write as on `corrupt` and everything that `freeze` names as on `clean`
    score[senders, receivers] = m(f) - m(f with x_v <- x_v' for every v of receivers, everything else live)

The first run carries the change of the senders along direct paths only: with `freeze="heads"` through MLPs, which are
run again, but through no other head (the paper's convention); with `freeze="all"` through nothing, so that of one
sender and one receiver it is the exact score of their edge. Positive where the paths help the metric.

Reference: Wang et al. (2022), "Interpretability in the wild", arXiv:2211.00593, section 3.1 and appendix B; Goldowsky-
Dill et al. (2023), "Localizing model behavior with path patching", arXiv:2304.05969.
Differs from the papers: receivers are what heads, MLPs and the unembedding read before their norms; several receivers
all get what the first run gave them, as in the paper, so what an earlier one would tell a later one is cut. Where a
norm stands after attention, a head's write is its share of the norm's output at the scale of its own run.
Cost: for each group of senders the MLPs between it and the receivers (nothing where all is frozen); for each pair of
groups the layers from the first receiver on. Memory: `chunk_size` groups of senders at a time, two
streams per layer each.
Exact: always.    Misleads when: a change flows along paths that the freeze cuts, or receivers of one group inform each
other; patched activations lie off the distribution.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError, did_you_mean
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.graph.build import Graph
from mechjax.graph.tap import READS, tapped
from mechjax.graph.writes import Writes, head_vectors, writes
from mechjax.metrics.measured import FromStart, Measured, measured
from mechjax.metrics.metric import Metric
from mechjax.models.block import Block
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, over_blocks
from mechjax.models.marks import marks_of
from mechjax.models.needs import needs_decoder
from mechjax.models.positions import Varying
from mechjax.models.room import at_once, backs_off
from mechjax.tasks.pairing import paired
from mechjax.transform.context import wanting
from mechjax.transform.transforms import capture

Freeze = Literal["heads", "all"]
"""What keeps to the clean run on the way from senders to receivers: heads alone (MLPs are live), or everything."""

CHUNK_BYTES = 256e6


class PathScores(Record):
    """What paths do for a metric: the metric of the clean run less that with the paths' ends patched.

    Attributes:
        scores: Mean over examples.
        per_example: The same per example.
        clean: Metric of the clean run, per example.
        senders: Names of the groups of senders, one's members joined by "+" (static).
        receivers: Names of the groups of receivers (static).
        freeze: What kept to the clean run on the way (static).
    """

    scores: Float[Array, "sender receiver"]
    per_example: Float[Array, "sender receiver batch"]
    clean: Float[Array, " batch"]
    senders: tuple[str, ...] = eqx.field(static=True)
    receivers: tuple[str, ...] = eqx.field(static=True)
    freeze: str = eqx.field(static=True)

    def axis_labels(self) -> Mapping[str, Sequence[str]]:
        """Names of the groups."""
        return {"sender": self.senders, "receiver": self.receivers}


class _Runs(eqx.Module):
    """Both runs: what nodes write in them, and what readers read in the clean one.

    Attributes:
        model: The decoder as its graph sees it.
        clean: What nodes write on clean prompts.
        sent: What the corrupt run writes less that.
        resid: What attention of each layer reads, and last the unembedding. Shape (layer + 1, batch, pos, d_model).
        mid: What MLPs read; None without. Shape (layer, batch, pos, d_model).
        mask: True for real tokens.
        measured: The metric.
    """

    model: Decoder
    clean: Writes
    sent: Writes
    resid: Array
    mid: Array | None
    mask: Array | None
    measured: Measured


@needs_decoder("graph")
@on_any_mesh
@backs_off
def path_patching(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    graph: Graph,
    senders: Sequence[str | Sequence[str]] | None = None,
    receivers: Sequence[str | Sequence[str]] = ("logits",),
    freeze: Freeze = "heads",
    chunk_size: int | None = None,
) -> PathScores:
    """Patch the paths from every sender to every receiver, and read the metric.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places.
        metric: A metric of `mechjax.metrics`: one number per example.
        graph: The model's graph, `mj.graph.build(model)`, whose names the next two use.
        senders: Nodes, such as "a0.h1", "m2" or "input", or groups of nodes that send together; by default every node
            by itself.
        receivers: Readers, such as "a1.h2<q>", "m3" or "logits", or groups that are patched together.
        freeze: "heads" or "all".
        chunk_size: Groups of senders that run at once; None plans it from their memory.

    Returns:
        The scores `[sender, receiver]`; 0 where no path leads from the one to the other.

    Raises:
        ArgumentError: A name that is no node, or no reader, of the graph; an empty group; the graph of another model;
            an argument outside its range; a run whose activations are not finite.
        PairingError: Clean and corrupt prompts that do not line up.
    """
    if freeze not in get_args(Freeze):
        raise ArgumentError(
            f"freeze={freeze!r}: expected 'heads' (MLPs between sender and receiver are live) or 'all' (direct paths)."
        )
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one group of senders must run at once.")
    who, of_senders = _groups("senders", graph.nodes if senders is None else senders, graph.nodes)
    where, of_receivers = _groups("receivers", receivers, graph.readers)
    seen = graph.whole("path_patching").view(model)
    (ids, mask), (other, _) = paired(clean, corrupt, model.config)
    both = writes(seen, ids, mask=mask), writes(seen, other, mask=mask)
    of = measured(metric, ids, mask, model.config.d_vocab)
    base, resid, mid = _clean_run(seen, of, both[0].input, mask)
    runs = _Runs(seen, both[0], jax.tree.map(jnp.subtract, both[1], both[0]), resid, mid, mask, of)
    chunk = min(chunk_size or at_once(CHUNK_BYTES, 4 * resid.nbytes), len(who))
    used = frozenset(site for site, mask in _by_site(graph, of_receivers).items() if mask.any())
    found = _sweep(runs, graph, jnp.asarray(of_senders), jnp.asarray(of_receivers), freeze, chunk, used)
    effect = base - found
    return PathScores(effect.mean(-1), effect, base, who, where, freeze)


def _groups(
    what: str, given: Sequence[str | Sequence[str]], known: tuple[str, ...]
) -> tuple[tuple[str, ...], Bool[np.ndarray, "group name"]]:
    """Names of the groups, and which of `known` each holds.

    Raises:
        ArgumentError: A name that there is not, an empty group, or no group.
    """
    if isinstance(given, str):
        given = [given]
    groups = [(group,) if isinstance(group, str) else tuple(group) for group in given]
    if not groups or not all(groups):
        raise ArgumentError(f"{what}={given!r}: name at least one in every group, such as {known[-1]!r}.")
    place = {name: i for i, name in enumerate(known)}
    held = np.zeros((len(groups), len(known)), bool)
    for row, group in zip(held, groups, strict=True):
        for name in group:
            if name not in place:
                raise ArgumentError(
                    f"{what}: the graph has no {'node' if what == 'senders' else 'reader'} `{name}`; its {len(known)} "
                    f"are named like `{known[len(known) // 2]}`, `{known[-1]}`.{did_you_mean(name, known)}"
                )
            row[place[name]] = True
    return tuple("+".join(group) for group in groups), held


def _by_site(graph: Graph, held: Any) -> dict[str, Any]:
    """Which readers are held, by the site at which they read: (group, layer, reader of the layer); logits (group,)."""
    rows = held[:, :-1].reshape(len(held), graph.n_layers, -1)
    ends = np.cumsum(list(graph.reads.values()))
    parts = {site: rows[..., end - n : end] for (site, n), end in zip(graph.reads.items(), ends, strict=True)}
    return parts | {"logits": held[:, -1]}


@eqx.filter_jit
def _clean_run(model: Decoder, of: Measured, start: Array, mask: Any) -> tuple[Array, Array, Array | None]:
    """The metric, and what attention (and, last, the unembedding) and MLPs read."""
    last = f"blocks.{model.config.n_layers - 1}.hook_resid_post"
    sites = ["resid_pre", *["mlp_in"] * (model.config.mlp != "none"), last]
    base, acts = capture(FromStart(model, of), sites)(start, mask)
    return base, jnp.concatenate((acts["resid_pre"], acts["resid_post"])), acts.arrays.get("mlp_in")


@eqx.filter_jit
def _sweep(
    runs: _Runs, graph: Graph, senders: Array, receivers: Array, freeze: str, chunk: int, used: frozenset[str]
) -> Float[Array, "sender receiver batch"]:
    """The metric of every cell: senders `chunk` at a time, receivers one after the other."""
    layers = jnp.arange(graph.n_layers + 1)
    parts = _by_site(graph, receivers)
    holds = receivers[:, :-1].reshape(len(receivers), graph.n_layers, -1).any(-1)
    first = jnp.where(holds, layers[:-1], graph.n_layers).min(-1).astype(jnp.int32)

    last = jnp.where(receivers[:, -1].any(), graph.n_layers, jnp.where(holds.any(0), layers[:-1], 0).max())

    def of_chunk(senders: Array) -> Array:
        sends = senders[:, 1:].reshape(len(senders), graph.n_layers, -1).any((0, 2))
        start = jnp.where(senders[:, 0].any(), 0, jnp.where(sends, layers[:-1], graph.n_layers).min())
        reads, mids = jax.vmap(lambda held: _moved(runs, graph, held, freeze, (start, last)))(senders)

        def group(xs: tuple[Array, dict[str, Array]]) -> Array:
            return jax.vmap(lambda read, mid: _patched(runs, read, mid, xs[0], xs[1], used))(reads, mids)

        return jnp.moveaxis(jax.lax.map(group, (first, parts)), 0, 1)

    n = -(-len(senders) // chunk)
    filled = jnp.zeros((n * chunk, len(graph.nodes)), bool).at[: len(senders)].set(senders)
    found = jax.lax.map(of_chunk, filled.reshape(n, chunk, -1))
    return found.reshape(n * chunk, *found.shape[2:])[: len(senders)]


def _moved(
    runs: _Runs, graph: Graph, held: Array, freeze: str, between: tuple[Array, Array]
) -> tuple[Array, Array]:
    """How far what attention (and, last, the unembedding) and what MLPs read is from the clean run, by direct paths.

    Only MLPs of the layers `between` the first sender and the last receiver are run.
    """
    config = runs.model.config
    own = held[1:].reshape(graph.n_layers, -1)
    sequence = runs.model.arrange(runs.resid.shape[-2], mask=runs.mask)

    def step(
        carry: tuple[Array, Array, Array], block: Block, here: Varying, layer: Array
    ) -> tuple[Array, Array, Array]:
        moved, reads, mids = carry
        reads = reads.at[layer].set(moved)
        each = head_vectors(block.attn.W_O, block.ln1_post, runs.sent.heads[layer], config)
        heads = contract("h,...hm->...m", own[layer, : graph.n_heads].astype(each.dtype), each, config)
        if runs.mid is None or runs.sent.mlps is None or runs.clean.mlps is None:
            return moved + heads, reads, mids
        at_mlp = moved + heads if graph.serial else moved
        mids = mids.at[layer].set(at_mlp)
        added = jnp.zeros_like(moved)
        if freeze == "heads":
            before = runs.clean.mlps[layer]
            run = lambda mid: _mlp(runs, block, sequence, here, layer, mid) - before
            on_the_way = (layer >= between[0]) & (layer < between[1])
            added = jax.lax.cond(on_the_way, run, jnp.zeros_like, runs.mid[layer] + at_mlp)
        added = jnp.where(own[layer, -1], runs.sent.mlps[layer], added)
        return moved + heads + added, reads, mids

    none = jnp.zeros_like(runs.resid)
    start = jnp.where(held[0], runs.sent.input, 0)
    with wanting(READS & {"mlp_in"}):
        moved, reads, mids = over_blocks(runs.model, step, (start, none, none[:-1]))
    return reads.at[-1].set(moved), mids


def _mlp(runs: _Runs, block: Block, sequence: Any, here: Varying, layer: Array, mid: Array) -> Array:
    """What the MLP of a layer writes where it reads `mid`."""
    seen: dict[str, Array] = {}
    config = runs.model.config
    mark = tapped(marks_of(layer, config), {"mlp_in": lambda _: mid}, seen)
    block(runs.resid[layer], sequence, here, layer, config, mark=mark)  # of which nothing else is kept
    return seen["mlp_out"]


def _patched(
    runs: _Runs, reads: Array, mids: Array, first: Array, held: dict[str, Array], used: frozenset[str]
) -> Float[Array, " batch"]:
    """The metric of the clean run in which the receivers `held` read what they would after the senders' change."""
    model = runs.model
    sequence = model.arrange(runs.resid.shape[-2], mask=runs.mask)

    def live(resid: Array, layer: Array) -> Array:
        read = runs.resid[layer] + reads[layer]
        changes: dict[str, Any] = {
            site: lambda x, site=site: jnp.where(held[site][layer][:, None], read[..., None, :], x)
            for site in used & {"q_input", "k_input", "v_input"}
        }
        if "mlp_in" in used and runs.mid is not None:
            mid = runs.mid[layer] + mids[layer]
            changes["mlp_in"] = lambda x: jnp.where(held["mlp_in"][layer], mid, x)
        return model.block(resid, layer, sequence, tapped(marks_of(layer, model.config), changes, {}))

    def step(resid: Array, layer: Array) -> tuple[Array, None]:
        return jax.lax.cond(layer >= first, live, lambda resid, _: resid, resid, layer), None

    with wanting(READS & used):
        last, _ = jax.lax.scan(step, runs.resid[first], jnp.arange(model.config.n_layers, dtype=jnp.int32))
    return runs.measured.of(model, jnp.where(held["logits"], runs.resid[-1] + reads[-1], last))
