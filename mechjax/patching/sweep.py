"""A sweep: both runs, and the cells of one group.

A group is a layer and a bucket of positions: its cells are edits at that layer, none of them before the bucket's start,
so the layers and (in a causal model) the positions before it are not run again. Groups of one bucket are one program,
whatever the layer.
"""

import math
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.catalogue import SITES
from mechjax.base.digests import tree_digest
from mechjax.base.whole import whole
from mechjax.metrics.measured import value_of
from mechjax.metrics.metric import Metric
from mechjax.models.cache import Cache
from mechjax.models.config import Config
from mechjax.models.decoder import Decoder, through
from mechjax.models.readout import readout
from mechjax.models.resume import resume
from mechjax.patching.finite import check_numbers
from mechjax.patching.grid import Grid
from mechjax.transform.edits import Edit, replace
from mechjax.transform.select import is_concrete
from mechjax.transform.transforms import capture, intervene

EMBEDS = frozenset({"embed", "pos_embed"})
TAIL = frozenset({"ln_final.scale", "ln_final.normalized", "logits"})
_MOST = 4  # buckets: each is compiled; four leave 15 % of what one for every position would save (measured)
_LEAST = 4  # positions of a bucket
_WORTH = {"cpu": 5e11}  # operations that take longer than a further bucket takes to compile (measured)
_WORTH_ELSEWHERE = 5e13


class Sweep(eqx.Module):
    """What is swept, checked.

    Attributes:
        model: The decoder.
        metric: What is read.
        donor: Ids of the run that activations come from. Shape (batch, pos).
        base: Ids of the run that they are put into. Shape (batch, pos).
        mask: True for real tokens.
        at: The position that the metric reads. Shape (batch,).
        columns: The tokens that it reads. Shape (batch, k); None for all.
        named: Named positions, in place of every column. Shape (name, batch).
        site: The site that is patched (static).
        over: The axes that are swept (static).
        sizes: Their lengths, without the layer's (static).
        starts: For each swept position the first that runs; empty where all positions run (static).
        chunk: Cells that run at once (static).
    """

    model: Decoder
    metric: Metric
    donor: Int[Array, "batch pos"]
    base: Int[Array, "batch pos"]
    mask: Bool[Array, "batch pos"] | None
    at: Int[Array, " batch"]
    columns: Int[Array, "batch k"] | None
    named: Int[Array, "name batch"] | None
    site: str = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)
    starts: tuple[int, ...] = eqx.field(static=True)
    chunk: int = eqx.field(static=True)

    @property
    def grid(self) -> Grid:
        """The cells that are swept."""
        layers = self.model.config.n_layers if "layer" in self.over else None
        return Grid(layers, self.over, self.sizes, self.starts, self.chunk, self.base.shape[1])

    @eqx.filter_jit
    def prepare(self) -> "Runs":
        """Run both sides.

        Raises:
            ArgumentError: The metric gives anything but one number per example.
        """
        last = self.model.config.n_layers - 1
        # Both runs are one program with an axis in front, which compiles in half the time of two.
        both = jnp.stack([self.donor, self.base])
        mask, at, columns = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (2, *x.shape)), (self.mask, self.at, self.columns)
        )
        ends = self.site in TAIL
        wanted = [self.site, f"blocks.{last}.hook_resid_post" if ends else "resid_pre"]
        (logits, cache), acts = capture(_Whole(self), list(dict.fromkeys(wanted)))(both, mask, at, columns)
        of_donor, of_base = (value_of(self.metric, of_run) for of_run in logits)
        streams = acts["resid_post" if ends else "resid_pre"][:, 1]
        donor = acts[self.site][:, 0] if acts.layers[self.site] else acts[self.site][0]
        if cache is not None:
            arrays = (cache.keys[:, 1], cache.values[:, 1], cache.real[1], cache.positions[1])
            cache = Cache(*arrays, cache.length)
        return Runs(donor, streams, cache, of_donor, of_base)

    @eqx.filter_jit
    def scores_of(self, runs: "Runs", layer: Any, cells: Array, start: int) -> Float[Array, "cell batch"]:
        """The metric of some cells of one group, per example, all at once; `start` is static."""
        layers = self.model.config.n_layers
        rest = _Rest(self, runs.cache if self.starts else None, start)

        def cell(index: Array) -> Array:
            edit = edit_of(self, runs, layer, index)
            if self.site in TAIL:
                return self.metric.of(intervene(rest, [edit])(runs.base[-1], jnp.int32(layers)))
            first = jnp.int32(0) if layer is None else layer
            stream = self.base if self.site in EMBEDS else runs.base[first][..., start:, :]
            patched = self.metric.of(intervene(rest, [edit])(stream, first))
            return jnp.where(self.at < start, runs.of_base, patched)  # an edit changes nothing before it

        return jax.vmap(cell)(cells)

    def check(self, *found: Array) -> None:
        """Whether metrics are numbers, where that can be seen.

        Raises:
            ArgumentError: They are not. The first node that is not finite is named, in either run.
        """
        check_numbers(self.model, (self.base, self.donor), self.mask, *found)

    def said(self, model: str | None) -> dict[str, Any]:
        """What tells this sweep from others, in a folder; the checksum of the model, where it is known."""
        return {
            "model": model or tree_digest(self.model),
            "donor": tree_digest((self.donor, self.mask)),
            "base": tree_digest((self.base, self.mask)),
            "metric": f"{type(self.metric).__qualname__} {tree_digest(self.metric)}",
            "shape": list(self.base.shape),
        }


class Runs(eqx.Module):
    """What cells need of the two runs.

    Attributes:
        donor: The activations that are put in: all layers of them, for a site that has layers.
        base: Residual streams of the base run, one per layer, and after the last.
        cache: Its keys and values; None where all positions run.
        of_donor: Its metric.
        of_base: The base run's.
    """

    donor: Float[Array, "..."]
    base: Float[Array, "stream batch pos d_model"]
    cache: Cache | None
    of_donor: Float[Array, " batch"]
    of_base: Float[Array, " batch"]


class _Whole(eqx.Module):
    """The model from tokens to the logits that a metric reads, and the cache."""

    sweep: Sweep

    def __call__(self, ids: Array, mask: Any, at: Array, columns: Any) -> tuple[Array, Cache | None]:
        model, config = self.sweep.model, self.sweep.model.config
        if self.sweep.starts:
            cache = Cache.empty(config, ids.shape[:-1], ids.shape[-1], model.W_E.dtype)
            resid, cache = model.proceed(ids, cache, mask=mask)
        else:
            sequence = model.arrange(ids.shape[-1], mask=mask)
            resid, cache = through(model, model.embed(ids, mask=mask), sequence)
        return read(model, resid, at, columns, unembeds=self.sweep.site in TAIL), cache


class _Rest(eqx.Module):
    """The model from a residual stream (or from its tokens) to the logits that a metric reads."""

    sweep: Sweep
    cache: Cache | None
    start: int = eqx.field(static=True)

    def __call__(self, stream: Array, layer: Any) -> Float[Array, "*batch token"]:
        sweep, model = self.sweep, self.sweep.model
        mask = sweep.mask if self.cache is None else None
        at = jnp.maximum(sweep.at - self.start, 0)
        resid = model.embed(stream, mask=mask) if sweep.site in EMBEDS else stream
        rest = resume(model, layer, cache=self.cache, start=self.start)
        if sweep.site in TAIL or (sweep.grid.layers is None and sweep.site not in EMBEDS):
            resid = rest.blocks(resid, mask=mask)
        else:
            resid, at = rest.final(resid, at, mask=mask), jnp.zeros_like(at)
        return read(model, resid, at, sweep.columns, unembeds=sweep.site in TAIL)


def read(
    model: Decoder, resid: Array, at: Array, columns: Array | None, *, unembeds: bool
) -> Float[Array, "*batch token"]:
    """The logits that a metric reads; with `unembeds`, through the sites of the unembedding."""
    if not unembeds:
        return readout(model, resid, at, columns)
    logits = model.unembed(resid)
    read = jnp.take_along_axis(logits, at[..., None, None], -2)[..., 0, :]
    return read if columns is None else jnp.take_along_axis(read, columns, -1)


def starts_of(
    config: Config,
    site: str,
    over: tuple[str, ...],
    sizes: tuple[int, ...],
    shape: tuple[int, ...],
    positions: Mapping[str, Any] | None,
) -> tuple[int, ...]:
    """For each swept position the first that must run; empty where all must.

    Positions can be left out where an edit stands at one position of a causal model, and changes none before it. That
    is done where it saves more than the programs of further buckets cost.
    """
    if "pos" not in over or not SITES[site].layered or not config.causal:
        return ()
    runs = config.n_layers if "layer" not in over else config.n_layers * (config.n_layers + 1) / 2
    block = sum(math.prod(s) for path, s in config.shapes.items() if path.startswith("blocks."))
    operations = 2 * block / config.n_layers * math.prod(shape) * math.prod(sizes) * runs
    worth = _WORTH.get(jax.default_backend(), _WORTH_ELSEWHERE)
    count, n_pos = min(_MOST, shape[1] // _LEAST, int(operations / worth)), shape[1]
    if count < 2:
        return ()
    if positions is None:
        first = np.arange(n_pos)
    elif all(is_concrete(at) for at in positions.values()):
        named = np.stack([whole(at) for at in positions.values()])
        first = np.where(named < 0, named + n_pos, named).clip(0, n_pos - 1).min(-1)
    else:
        return ()
    bounds = np.array([i * n_pos // count for i in range(count)])
    return tuple(int(bounds[bounds <= at].max()) for at in first)


def edit_of(sweep: Sweep, runs: Runs, layer: Any, index: Int[Array, " axis"]) -> Edit:
    """What patches one cell."""
    where: dict[str, Any] = dict(zip(sweep.grid.swept, index, strict=True))
    if sweep.named is not None:
        where["pos"] = sweep.named[where["pos"]][:, None]  # one position per example
    return replace(sweep.site, runs.donor, per_layer=SITES[sweep.site].layered, layer=layer, **where)


def shaped(grid: Grid, scores: Float[Array, "layer cell batch"]) -> Float[Array, "*over batch"]:
    """Scores with the axes in the order asked for."""
    if grid.layers is None:
        return scores.reshape(*grid.sizes, -1)
    scores = scores.reshape(grid.layers, *grid.sizes, -1)
    return jnp.moveaxis(scores, 0, grid.over.index("layer"))
