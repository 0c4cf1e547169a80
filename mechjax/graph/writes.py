"""What the nodes of a graph write to the residual stream, kept small: heads before their output weights."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.whole import whole
from mechjax.graph.build import Graph
from mechjax.graph.units import directions, scaled, units_of, values, written
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.decoder import Decoder, Tokens, as_tokens, through
from mechjax.models.needs import needs_decoder
from mechjax.models.norms import Norm
from mechjax.models.quantized import Weight
from mechjax.transform.captured import Activations
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture


class Writes(eqx.Module):
    """What every node writes in one run. What heads write is linear in `heads`: sums and means of runs are runs.

    Attributes:
        input: Token and position embeddings. Shape (*batch, pos, d_model).
        heads: Each head's `z`, over the scale of the norm after attention, if there is one. Shape (layer, *batch, pos,
            head, d_head).
        mlps: What MLPs (or experts) write, with their units; None without. Shape (layer, *batch, pos, d_model).
        units: The values of those units of MLPs that are nodes; None where none are. Shape (layer, *batch, pos, unit).
    """

    input: Float[Array, "*batch pos d_model"]
    heads: Float[Array, "layer *batch pos head d_head"]
    mlps: Float[Array, "layer *batch pos d_model"] | None
    units: Float[Array, "layer *batch pos unit"] | None = None

    def examples(self, rows: slice) -> "Writes":
        """Those of some examples of a batch."""
        return self.mapped(lambda x, lead: x[(slice(None),) * lead + (rows,)])

    def mapped(self, fn: Callable[..., Any], *others: "Writes") -> "Writes":
        """`fn(x, ..., lead)` of each array, with the number of axes before batch and position: 1 for layers, else 0."""
        lead = eqx.tree_at(lambda w: w.input, jax.tree.map(lambda _: 1, self), 0)
        return jax.tree.map(fn, self, *others, lead)

    def vectors(self, model: Decoder, graph: Graph | None = None) -> Float[Array, "node *batch pos d_model"]:
        """What every node writes, as vectors of the stream, in the order of `graph.nodes`.

        Args:
            model: The decoder.
            graph: Its graph, which `units` need.

        Raises:
            ArgumentError: Units without a graph.
        """
        if self.units is not None and graph is None:
            raise ArgumentError(
                "what units write hangs on the graph that says which they are: give it, `vectors(model, graph)`."
            )
        blocks, config = model.blocks, model.config

        def of_layer(W_O: Weight, post: Norm | None, z: Array) -> Array:
            return jnp.moveaxis(head_vectors(W_O, post, z, config), -2, 0)

        own, mlps = jax.vmap(of_layer)(blocks.attn.W_O, blocks.ln1_post, self.heads), self.mlps
        if self.units is not None and mlps is not None and graph is not None:
            index = units_of(graph.units, graph.n_units)
            towards = jax.vmap(lambda block, i: directions(block, i, config))(blocks, index)
            apart = contract("l...k,lkm->lk...m", self.units, towards, config)
            own = jnp.concatenate((own, apart), 1)
            mlps = mlps - contract("l...k,lkm->l...m", self.units, towards, config)
        if mlps is not None:
            own = jnp.concatenate((own, mlps[:, None]), 1)
        rows = jnp.concatenate((self.input[None], own.reshape(-1, *self.input.shape)))
        return rows if graph is None or len(rows) == len(graph.nodes) else rows[graph.rows]


def head_vectors(
    W_O: Float[Weight, "head d_head d_model"],
    post: Norm | None,
    z: Float[Array, "*batch pos head d_head"],
    config: Config,
) -> Float[Array, "*batch pos head d_model"]:
    """What the heads of a layer write: `z W_O`, through the norm after attention, whose scale `z` is already over."""
    return written(contract("...hd,hdm->...hm", z, W_O, config), post, config)


class Blocks(eqx.Module):
    """The blocks of a model alone: from what enters the first to what the unembedding reads."""

    model: Decoder

    def __call__(
        self, start: Float[Array, "*batch pos d_model"], mask: Any
    ) -> Float[Array, "*batch pos d_model"]:
        """The final residual stream."""
        return through(self.model, start, self.model.arrange(start.shape[-2], mask=mask))[0]


def sites(model: Decoder, graph: Graph | None = None) -> tuple[str, ...]:
    """The sites that writes are made of, beside what enters the first block."""
    post, mlp = model.blocks.ln1_post is not None, model.config.mlp != "none"
    units = graph is not None and bool(graph.units)
    after = units and model.blocks.ln2_post is not None
    return (
        "z", *("ln1_post.scale",) * post, *("mlp_out",) * mlp, *("mlp_in",) * units,
        *("ln2_post.scale",) * after,
    )  # fmt: skip


@needs_decoder("graph")
@on_any_mesh
def writes(
    model: Decoder,
    tokens: Tokens,
    *,
    graph: Graph | None = None,
    mask: Bool[Array, "*batch pos"] | None = None,
) -> Writes:
    """What every node writes in the run of `tokens`. Costs one forward without its unembedding.

    Args:
        model: The decoder.
        tokens: Prompts.
        graph: The model's graph; only one that has units of MLPs as nodes is needed.
        mask: True for real tokens.

    Raises:
        ArgumentError: Activations that are not finite, where that can be seen; the first site is named.
    """
    ids, mask = as_tokens(tokens, mask, model.config)
    return writes_from(model, model.embed(ids, mask=mask), mask, graph)


def writes_from(
    model: Decoder,
    start: Float[Array, "*batch pos d_model"],
    mask: Bool[Array, "*batch pos"] | None = None,
    graph: Graph | None = None,
) -> Writes:
    """What every node writes in the run that begins with `start`.

    Raises:
        ArgumentError: Activations that are not finite, where that can be seen; the first site is named.
    """
    return recorded(model, start, _captured(model, start, mask, sites(model, graph)), graph)


@eqx.filter_jit
def _captured(model: Decoder, start: Array, mask: Array | None, names: tuple[str, ...]) -> Activations:
    return capture(Blocks(model), names)(start, mask)[1]


def recorded(
    model: Decoder,
    start: Float[Array, "*batch pos d_model"],
    acts: Activations,
    graph: Graph | None = None,
) -> Writes:
    """The writes in a capture of `sites` of the run that begins with `start`.

    Raises:
        ArgumentError: Activations that are not finite, where that can be seen; the first site is named.
    """
    z = acts["z"]
    if "ln1_post.scale" in acts:
        z = z / acts["ln1_post.scale"][..., None].astype(z.dtype)
    units = None if graph is None or not graph.units else _units(model, acts, graph)
    found = Writes(start, z, acts.arrays.get("mlp_out"), units)
    _check_finite(found)
    return found


@eqx.filter_jit
def _units(model: Decoder, acts: Activations, graph: Graph) -> Float[Array, "layer *batch pos unit"]:
    """The values of units of MLPs."""
    index = units_of(graph.units, graph.n_units)

    def of_layer(xs: tuple[Any, Array, Array, Array | None]) -> Array:
        block, x, i, scale = xs
        return scaled(values(block, x, i, model.config), block, scale)

    return jax.lax.map(of_layer, (model.blocks, acts["mlp_in"], index, acts.arrays.get("ln2_post.scale")))


def _check_finite(found: Writes) -> None:
    """Names the first node site that is not finite."""
    if not is_concrete(found.input):
        return
    if not bool(jnp.isfinite(found.input).all()):
        raise _not_finite("resid_pre", 0)
    stacks = [("z", found.heads)] + ([] if found.mlps is None else [("mlp_out", found.mlps)])
    fine = [whole(jnp.isfinite(x).all(tuple(range(1, x.ndim)))) for _, x in stacks]
    for layer in range(len(fine[0])):
        for (site, _), finite in zip(stacks, fine, strict=True):
            if not finite[layer]:
                raise _not_finite(site, layer)


def _not_finite(site: str, layer: int) -> ArgumentError:
    return ArgumentError(
        f"`{site}` of layer {layer} is not finite in this run, though all before it is: scores would all be NaN. Look "
        f"at mj.capture(model, '{site}')(prompts); half precision that overflows is the usual cause."
    )
