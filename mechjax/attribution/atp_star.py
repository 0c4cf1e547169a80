"""AtP*: attribution patching that sees through saturated attention and through effects that cancel.

    queries, keys    score = - sum over pattern entries of (p' - p) . dm/dp        p' the pattern with that node ablated
    other nodes      score = (a(clean) - a(ablated)) . dm/da
    with GradDrop    score = 1/(L-1) sum over layers l of |score, gradients through what layer l writes dropped|

where p is the attention pattern of the clean run, formed again with one query (or one key) ablated, all else linear, m
the metric and L the number of layers. A layer that is dropped drops its own nodes: hence L-1.

Reference: Kramár et al. (2024), arXiv:2403.00745, sections 3.1 (QK fix) and 3.2 (GradDrop). `diagnose` is section 3.3.
Differs from the paper: keys by one closed form (`softmax_effects`), in place of the paper's two algorithms; shared keys
and values are nodes once; nodes may also be whole heads, all positions at once (`per_position=False`). From the code of
koayon/atp_star: that scores keys on patterns with the query ablated, this on patterns with the key ablated.
Cost: a forward for each side, three for queries and keys, whose patterns of all layers are kept, and one forward and
backward; with GradDrop L backwards, `chunk_size` of them on one forward. No exact patch is run.
Exact when: the metric is affine in patterns and the other nodes, and without GradDrop: its sizes never are.
Misleads when: nodes work only together, or a metric saturates. Verify what comes out on top with `diagnose`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mechjax.attribution.grad_drop import gates
from mechjax.attribution.node_scores import NodeScores, node_scores
from mechjax.attribution.scores import Reduce
from mechjax.attribution.sides import Sides, check_finite, per_place, product, sides
from mechjax.attribution.softmax_effects import column_effect, with_sinks
from mechjax.attribution.subject import Ablation
from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.metrics.measured import itself
from mechjax.metrics.metric import Metric
from mechjax.models.contraction import widened
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.room import at_once, backs_off
from mechjax.transform.edits import Edit, replace
from mechjax.transform.gradients import value_and_grad_at
from mechjax.transform.transforms import capture, intervene

NODES: dict[str, tuple[str, ...]] = {
    "q": ("head",), "k": ("kv_head",), "v": ("kv_head",), "z": ("head",), "attn_out": (),
    "mlp_pre": ("d_mlp",), "mlp_post": ("d_mlp",), "mlp_out": (),
}  # fmt: skip
"""The sites that have nodes, with the axes of these beside layer and position."""
FIXED = ("q", "k")
CHUNK_BYTES = 256e6  # gradients of all layers that are there at once


@needs_decoder("attention")
@on_any_mesh
@backs_off
def atp_star(
    model: Decoder,
    clean: Any,
    corrupt: Any,
    metric: Metric,
    *,
    sites: Sequence[str] | None = None,
    per_position: bool = True,
    positions: Mapping[str, Int[Array, " batch"]] | None = None,
    qk_fix: bool = True,
    grad_drop: bool = True,
    ablation: Ablation = "resample",
    reference: Any = None,
    reduce: Reduce = "mean_of_abs",
    chunk_size: int | None = None,
) -> NodeScores:
    """Score all nodes.

    Args:
        model: The decoder.
        clean: Prompts that show the behaviour, `Prompts` or ids (batch, pos).
        corrupt: Prompts that do not, with the same tokens at the same places; None where the ablation needs none.
        metric: A metric of `mechjax.metrics`: one number per example.
        sites: Whose nodes: of "q", "k", "v", "z", "attn_out", "mlp_pre", "mlp_post" and "mlp_out". By default queries,
            keys, values, heads' outputs and MLPs' (`mlp_out`).
        per_position: Whether every position is a node; else heads, neurons and layers are, all positions at once.
        positions: Named positions, one per example, in place of every column.
        qk_fix: Whether queries and keys are scored by the pattern that they give; else by their gradient.
        grad_drop: Whether to drop layers in turn. Scores are sizes then, and `reduce` is "mean_of_abs".
        ablation: What stands in, as in `attribution_patch`.
        reference: The prompts of a mean.
        reduce: How examples become one number, as in `attribution_patch`.
        chunk_size: Layers that are dropped at once, on one forward; None plans it from their memory.

    Returns:
        The scores of every site's nodes.

    Raises:
        ArgumentError: An argument outside its range, a model that a fix does not fit, or activations that are not
            finite.
        PairingError: Clean and corrupt prompts that do not line up.
        SiteError: A site that this model does not have.
        ShapeError: Positions or reference prompts of another length.
    """
    names = _names(model, sites)
    _check(model, names, positions, reduce, per_position=per_position, qk_fix=qk_fix, grad_drop=grad_drop)
    if chunk_size is not None and chunk_size < 1:
        raise ArgumentError(f"chunk_size={chunk_size}: at least one layer must be dropped at once.")
    fixed = tuple(name for name in names if qk_fix and name in FIXED)
    given = sides(
        model, clean, corrupt, metric, names, beside=FIXED if fixed else (),
        ablation=ablation, reference=reference, reduce=reduce, positions=positions,
    )  # fmt: skip
    found, value = _estimates(
        given, fixed, per_position, grad_drop, chunk_size or _plan(model, given.ids.shape)
    )
    check_finite(given, found, value)
    return node_scores(
        found, value, given.named, reduce,
        axes=tuple((name, node_axes(name, per_position=per_position)) for name in names),
        labels=(("pos", tuple(positions)),) if positions else (),
        method=f"atp_star(qk_fix={qk_fix}, grad_drop={grad_drop})", ablation=ablation,
    )  # fmt: skip


def node_axes(site: str, *, per_position: bool) -> tuple[str, ...]:
    """The axes of a site's nodes."""
    return ("layer", *(("pos",) if per_position else ()), *NODES[site])


def _names(model: Decoder, sites: Sequence[str] | None) -> tuple[str, ...]:
    if sites is None:
        return ("q", "k", "v", "z", *(("mlp_out",) if model.config.mlp != "none" else ()))
    wrong = [site for site in sites if site not in NODES]
    if wrong or not sites or len(set(sites)) < len(sites):
        raise ArgumentError(
            f"sites={tuple(sites)}: name sites that have nodes, each once, at least one: {', '.join(NODES)}."
        )
    return tuple(sites)


def _check(
    model: Decoder, names: tuple[str, ...], positions: Any, reduce: str, *, per_position: bool, qk_fix: bool,
    grad_drop: bool,
) -> None:  # fmt: skip
    if grad_drop and reduce != "mean_of_abs":
        raise ArgumentError(
            f"reduce={reduce!r}: with grad_drop=True each example's score is a mean of sizes, so examples are reduced "
            "by 'mean_of_abs'. Say grad_drop=False for signed scores."
        )
    if grad_drop and model.config.n_layers < 2:
        raise ArgumentError(
            "grad_drop=True drops each layer in turn and needs two at least; this model has one. Say grad_drop=False."
        )
    if positions is not None and not per_position:
        raise ArgumentError("positions= names positions to score, but per_position=False has none.")
    if qk_fix and model.config.qk_norm == "joint" and set(names) & set(FIXED):
        raise ArgumentError(
            "qk_fix=True ablates the query (or key) of one head; this model norms those of all heads together "
            "(qk_norm='joint'), so that one moves all others. Say qk_fix=False."
        )
    mixed = [name for name in names if name.startswith("mlp_p")] if model.config.experts is not None else []
    if mixed:
        raise ArgumentError(
            f"sites has {mixed[0]!r}, which not every layer of a model with experts has: score 'mlp_out'."
        )


def _plan(model: Decoder, shape: tuple[int, ...]) -> int:
    """Layers whose backward passes fit in CHUNK_BYTES: gradients of a block's widest arrays, for every layer."""
    c, (batch, n_pos) = model.config, shape
    per_token = c.d_mlp + 3 * c.d_model + c.n_heads * (3 * c.d_head + 2 * n_pos)
    return at_once(CHUNK_BYTES, per_token * batch * n_pos * c.n_layers * model.W_E.dtype.itemsize)


@eqx.filter_jit
def _estimates(
    given: Sides, fixed: tuple[str, ...], per_position: bool, grad_drop: bool, chunk: int
) -> tuple[dict[str, Array], Array]:
    """Per node and example: scores, or with GradDrop the mean of their sizes; and the clean metric."""
    model, n_layers = given.run.model, given.run.model.config.n_layers
    read = (*(name for name in given.names if name not in fixed), *(("pattern",) if fixed else ()))
    rows = _rows(given, fixed, per_position=per_position) if fixed else {}

    def estimate(edits: list[Edit]) -> tuple[dict[str, Array], Array]:
        value, slopes = value_and_grad_at(intervene(given.run, edits), itself, read)(*given.clean)
        found = {}
        for info in given.sites:
            over = node_axes(info.name, per_position=per_position)
            if info.name in fixed:
                own = {site: x[jnp.array([0, 1 + fixed.index(info.name)])] for site, x in rows.items()}
                x = _fixed(model, info.name, own, widened(slopes["pattern"]), per_position=per_position)
                x = jnp.moveaxis(x, 1, -1)
                found[info.name] = x if given.named is None else _columns(x, given.named)
            else:
                found[info.name] = per_place(
                    product(given, info.name, slopes[info.name]), info, over, given.named
                )
        return found, value

    if not grad_drop:
        return estimate([])
    layers = jnp.arange(n_layers, dtype=jnp.int32)

    def dropped(layer: Array) -> tuple[dict[str, Array], Array]:
        found, value = estimate(gates((layers != layer).astype(jnp.float32), model.config))
        own = lambda x: jnp.where((layers != layer).reshape(-1, *(1,) * (x.ndim - 1)), jnp.abs(x), 0)
        return jax.tree.map(own, found), value

    sizes, values = jax.lax.map(dropped, layers, batch_size=min(chunk, n_layers))
    return jax.tree.map(lambda x: x.sum(0) / (n_layers - 1), sizes), values[0]


def _rows(given: Sides, fixed: tuple[str, ...], *, per_position: bool) -> dict[str, Array]:
    """Scores or patterns of every layer, what is needed: as they are, then with all queries, or all keys, ablated.

    One program makes them all, so that equal ones are equal to the bit.
    """
    single = "k" in fixed and per_position
    wanted = (*("attn_scores",) * single, *("pattern",) * ("q" in fixed or not per_position))
    stacks = [
        jnp.stack([given.intact[s], *(given.ablated[s] if s == name else given.intact[s] for name in fixed)])
        for s in FIXED
    ]

    def rows(stack: list[Array]) -> dict[str, Array]:
        edits = [replace(site, x, per_layer=True) for site, x in zip(FIXED, stack, strict=True)]
        return capture(intervene(given.run, edits), wanted)(*given.clean)[1].arrays

    return jax.lax.map(rows, stacks)


def _fixed(model: Decoder, name: str, rows: dict[str, Array], slopes: Array, *, per_position: bool) -> Array:
    """Scores of queries or keys, from rows as they are and ablated. Shape (layer, batch, pos, head), or without."""
    if name == "k" and per_position:
        sinks = getattr(model.blocks.attn, "sinks", None)
        scores, moved = (with_sinks(x, sinks) for x in rows["attn_scores"])
        beside = jnp.pad(slopes, [(0, 0)] * 4 + [(0, scores.shape[-1] - slopes.shape[-1])])
        effect = column_effect(scores, moved, beside).sum(-2)[..., : slopes.shape[-1]]
    else:
        pattern, moved = widened(rows["pattern"])
        effect = ((moved - pattern) * slopes).sum(-1)
    effect = effect if per_position else effect.sum(-1, keepdims=True)
    if name == "k":  # a shared key is that of all its heads
        effect = effect.reshape(*effect.shape[:2], model.config.n_kv_heads, -1, effect.shape[-1]).sum(3)
    effect = -jnp.swapaxes(effect, -1, -2)
    return effect if per_position else effect[..., 0, :]


def _columns(x: Array, named: Array) -> Array:
    """Named positions of (layer, pos, head, batch)."""
    at = named[None, :, None, :]
    return jnp.take_along_axis(x, at, 1, mode="fill", fill_value=jnp.nan)
