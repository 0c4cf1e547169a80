"""Circuit paths. By which ways, through latents and heads, does a latent come to be active?

A path ends in the latent. Each step back from there is one part of what the last one reads: a latent of an earlier
transcoder, a head and the position that it moves from, a skip, an embedding, an error. So a path of latents i and k

    t0[i] @ s -> L1.H3 -> t1[k] @ t -> t2[j] @ t        contributes f_i (W_dec[i] . d_h) (W_dec[k] . d_j) * gain

to the pre-activation of j, where d_j = C(w * W_enc[:, j]) is what j reads and d_h = C(w * W_V W_O d_k) what k reads
through the head: the activation where the path begins, times the connections on its way, times `gain`, one over the
scales of the norms and the patterns of the heads on it. An active latent is what its encoder gives, a sum of its own
parts; so the contributions of all paths that go on from a path, with the biases there, sum to its own. Of all that go
on from the `n_paths` kept last, the `n_paths` largest are kept, `n_steps` times.

Reference: Dunefsky, Chlenski and Nanda (2024), "Transcoders find interpretable LLM feature circuits", arXiv:2406.11944,
"finding computational subgraphs" (in the authors' code `greedy_get_top_paths`, raw attribution).
Differs from it: norms are as in `feature_attribution`; errors and skips are steps too (there errors are drawn beside);
`rank="size"` keeps paths of either sign; the first position is a source like others unless `skip_first` leaves it out
(there `ignore_bos`, by default).
Cost: one forward, and for each step and kept path an encoding of all layers and `d_model` products for each latent.
Exact: each contribution, with patterns, scales and the set of active latents held.    Misleads when: much is dropped
(compare sums with `total`), or paths of both signs cancel, of which `rank="value"` shows one half.
"""

from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.attribution.asked_latent import check_values, columns
from mechjax.attribution.frozen_reads import Reading, Reads, Run
from mechjax.attribution.latent_parts import Node, example_label, parts_of, path_label
from mechjax.attribution.transcoders import Given, stack_transcoders
from mechjax.base.display import LEADING, as_html
from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.models.decoder import Decoder, as_tokens
from mechjax.models.needs import needs_decoder
from mechjax.tasks.pairing import batched

STEPS = ("latents", "heads", "skips", "errors", "embed", "pos_embed")
"""The parts that paths are made of; of the last three nothing goes on."""

Rank = Literal["value", "size"]
"""Which paths are kept: those that add most, or whose contributions are largest in size."""


class CircuitPaths(Record):
    """Paths to a latent, step by step; those of one step from the largest contribution on.

    Attributes:
        contributions: What of the latent's pre-activation comes by each path; 0 where there are fewer.
        parents: Which path of the step before it goes on from.
        parts: What was added to that, by its place in `STEPS`; -1 where there is no path.
        index: Of that part: which transcoder and feature, or which layer and head.
        at: The position where it reads: that of a latent, or from which a head moves.
        total: The latent's pre-activation.
        activation: The latent itself: its pre-activation where it is active, else 0.
        layer: Its layer.
        feature: Its number.
        target: Its position, a column of the prompt.
        layers: Of the transcoders (static).
    """

    contributions: Float[Array, "batch step path"]
    parents: Int[Array, "batch step path"]
    parts: Int[Array, "batch step path"]
    index: Int[Array, "batch step path two"]
    at: Int[Array, "batch step path"]
    total: Float[Array, " batch"]
    activation: Float[Array, " batch"]
    layer: Int[Array, ""]
    feature: Int[Array, ""]
    target: Int[Array, " batch"]
    layers: tuple[int, ...] = eqx.field(static=True)

    def nodes(self, example: int, step: int, path: int) -> tuple[Node, ...]:
        """A path from its end, the latent, on.

        Raises:
            ArgumentError: There is no such path.
        """
        parts, parents, index, at = (whole(x) for x in (self.parts, self.parents, self.index, self.at))
        there = all(0 <= i < n for i, n in zip((example, step, path), parts.shape, strict=True))
        if not there or parts[example, step, path] < 0:
            raise ArgumentError(
                f"there is no path {path} of step {step} in example {example}: there are {parts.shape[0]} examples, "
                f"and of step {step} {int((parts[example, step] >= 0).sum()) if there else 0} paths."
            )
        found: list[Node] = []
        for i in range(step, -1, -1):
            where = (example, i, path)
            first, second = index[where].tolist()
            found.append(Node(STEPS[parts[where]], (first, second, int(at[where])), int(at[where])))
            path = int(parents[where])
        latent = (self.layers.index(int(self.layer)), int(self.feature))
        return Node("latents", latent, int(self.target[example])), *reversed(found)

    def label(self, example: int, step: int, path: int) -> str:
        """The name of a path, such as `t2[137] @ 5 -> L3.H1 -> t4[9] @ 7`."""
        return path_label(self.nodes(example, step, path), self.layers)

    def top(self, n: int = 10) -> list[tuple[str, float]]:
        """The `n` paths, of any length, whose contributions are largest in size, as (label, contribution)."""
        found = whole(self.contributions, np.float64)
        sizes = np.where(whole(self.parts) >= 0, np.nan_to_num(np.abs(found)), -1.0)
        order = [np.unravel_index(i, found.shape) for i in np.argsort(-sizes, axis=None, kind="stable")[:n]]
        places = [(int(i[0]), int(i[1]), int(i[2])) for i in order if sizes[i] >= 0]
        return [(example_label(i[0], len(found)) + self.label(*i), float(found[i])) for i in places]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary per path: its example, its step, its label, its contribution."""
        found = whole(self.contributions)
        places = [(int(b), int(s), int(p)) for b, s, p in np.argwhere(whole(self.parts) >= 0)]
        return [
            {"example": i[0], "step": i[1], "path": self.label(*i), "contribution": float(found[i])}
            for i in places
        ]

    def _repr_html_(self) -> str:
        return as_html(self, {}, self.top(LEADING))


@needs_decoder("transcoders")
@on_any_mesh
def circuit_paths(
    model: Decoder,
    transcoders: Given,
    prompts: Any,
    *,
    layer: Any,
    feature: Any,
    pos: Any = -1,
    n_steps: int = 3,
    n_paths: int = 10,
    rank: Rank = "value",
    skip_first: bool = False,
) -> CircuitPaths:
    """Search for the paths by which a latent comes to be active, greedily, from it back.

    Args:
        model: The decoder.
        transcoders: Layer -> its transcoder, or a cross-layer one, or what `stack_transcoders` made of them.
        prompts: `Prompts` or ids (batch, pos).
        layer: The layer of the latent.
        feature: Its number.
        pos: The position of the latent, as in `feature_attribution`.
        n_steps: Parts of the longest paths.
        n_paths: How many paths of each length are kept, in each example.
        rank: Which: "value", those that add most; or "size", those whose contributions are largest in size.
        skip_first: Whether no path leads through a head to the first real token, which heads look at where they do
            nothing.

    Returns:
        The paths: `top` gives the largest with their labels, `rows` all.

    Raises:
        ArgumentError: A latent or a position that there is not, transcoders that cannot be taken apart, an unknown
            rank, or no step or path.
        ShapeError: More than one latent, positions for other prompts, or transcoders of another model.
        UnsupportedModelError: A model without MLPs, or one whose heads' values are not linear in what these are given.
    """
    if min(n_steps, n_paths) < 1 or rank not in get_args(Rank):
        raise ArgumentError(
            f"n_steps={n_steps}, n_paths={n_paths}, rank={rank!r}: search for at least one step and one path, by "
            "'value' or 'size'."
        )
    reads = Reads(model, stack_transcoders(model, transcoders))
    check_values(model)
    latent = reads.transcoders.latent(layer, feature)
    ids, mask = as_tokens(batched(prompts), None, model.config)
    at = columns(pos, ids, mask)
    search = _Search(reads, jnp.asarray(skip_first), n_paths, n_steps, rank == "size")
    return CircuitPaths(
        **_searched(search, ids, mask, latent, at), layer=latent[0], feature=latent[1], target=at,
        layers=reads.transcoders.layers,
    )  # fmt: skip


class _Search(eqx.Module):
    """What is searched, and how."""

    reads: Reads
    skip_first: Array
    n_paths: int = eqx.field(static=True)
    n_steps: int = eqx.field(static=True)
    by_size: bool = eqx.field(static=True)

    def grow(self, run: Run, first: Array, ends: Reading) -> tuple[Reading, dict[str, Array]]:
        """The paths that go on from those that end in `ends`, and where they end."""
        parts = jax.vmap(lambda end: parts_of(self.reads, run, end))(ends)
        barred = self.skip_first & (jnp.arange(run.pattern.shape[-1], dtype=jnp.int32) == first)
        parts |= {"heads": jnp.where(barred, 0, parts["heads"])}
        rows = [parts[name].reshape(self.n_paths, -1) for name in STEPS]
        every = jnp.concatenate(rows, 1)
        key = jnp.where(every == 0, -jnp.inf, jnp.abs(every) if self.by_size else every).reshape(-1)
        height, flat = lax.top_k(key, self.n_paths)
        parents, place = flat // every.shape[1], flat % every.shape[1]
        starts = np.cumsum([0, *(row.shape[1] for row in rows)], dtype=np.int32)
        part = jnp.searchsorted(jnp.array(starts[1:]), place, side="right").astype(jnp.int32)
        index = self._index(part, place - jnp.array(starts)[part], run)
        there = height > -jnp.inf
        found = {
            "contributions": jnp.where(there, every.reshape(-1)[flat], 0), "parents": parents,
            "parts": jnp.where(there, part, -1), "index": index[:, :2],
        }  # fmt: skip
        ends = jax.vmap(self._end, (None, None, None, 0, 0, 0, 0))(
            run, ends, parts["connections"], parents, part, index, there
        )
        return ends, found | {"at": ends.at}

    def _index(self, part: Array, place: Array, run: Run) -> Int[Array, "path three"]:
        """Which latent, or which head and source, from its place among the numbers of its part."""
        width, (n_heads, n_pos) = self.reads.transcoders.n_features, run.pattern.shape[1::2]
        none = jnp.zeros_like(place)
        latent = jnp.stack((place // width, place % width, none), -1)
        head = jnp.stack((place // (n_heads * n_pos), place // n_pos % n_heads, place % n_pos), -1)
        one = jnp.stack((place, none, none), -1)
        return jnp.where((part == 0)[:, None], latent, jnp.where((part == 1)[:, None], head, one))

    def _end(
        self,
        run: Run,
        ends: Reading,
        connections: Array,
        parent: Array,
        part: Array,
        index: Array,
        there: Array,
    ) -> Reading:
        """What is read where a path ends; nothing, at the same position, where it cannot go on."""
        reads, end = self.reads, jax.tree.map(lambda x: x[parent], ends)
        (first, second, source), layers = index, jnp.array(reads.transcoders.layers, jnp.int32)
        vector = reads.transcoders.encoder(layers[first], second, reads.model.config, reads.dtype)[0]
        reader = connections[parent, first, second] * vector
        choices = (
            reads.mlp(run, reader, end.gain, layers[first], end.at),
            reads.head(run, end, first, second, source),
            reads.skip(run, end, layers[first]),
            _nothing(end),
        )
        which = jnp.where(there, jnp.minimum(part, len(choices) - 1), len(choices) - 1)
        return jax.tree.map(lambda *x: jnp.stack(x)[which], *choices)


def _nothing(reading: Reading) -> Reading:
    """What reads nothing at a position."""
    return eqx.tree_at(lambda r: r.at, jax.tree.map(jnp.zeros_like, reading), reading.at)


@eqx.filter_jit
def _searched(
    search: _Search, ids: Array, mask: Array | None, latent: tuple[Array, Array], at: Array
) -> dict[str, Array]:
    reads = search.reads
    real = jnp.ones(ids.shape, bool) if mask is None else mask

    def of(xs: tuple[Run, Array, Array]) -> dict[str, Array]:
        run, first, at = xs
        root = reads.latent(run, *latent, at)
        more = jax.tree.map(lambda x: jnp.broadcast_to(x, (search.n_paths, *x.shape)), _nothing(root))
        ends = jax.tree.map(lambda x, one: x.at[0].set(one), more, root)
        found = lax.scan(lambda ends, _: search.grow(run, first, ends), ends, None, search.n_steps)[1]
        total, activation = reads.measured(run, *latent, at)
        return found | {"total": total, "activation": activation}

    return lax.map(of, (reads.record(ids, mask), real.argmax(-1).astype(jnp.int32), at))
