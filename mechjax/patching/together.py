"""All cells of a sweep in one program.

A cell that is patched at layer s runs the layers from s on. Layer by layer, with the cells of all earlier layers side
by side, each layer's weights are fetched once for a bucket of positions; layer after layer of cells, they would be for
every pair of layers (on 2 CPU cores that was 1.9 of 8 seconds for 12 layers of 28 MB: XLA copies a scanned layer's
weights out of their stack). The streams of all cells are then held at once: where they do not fit, and for layers that
differ in kind, cells run layer after layer.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.models.block import Block
from mechjax.models.cache import Prefix
from mechjax.models.config import Config
from mechjax.models.positions import Sequence, Varying
from mechjax.models.resume import arranged, last_at, read_at, resume
from mechjax.patching.grid import even
from mechjax.patching.sweep import EMBEDS, TAIL, Runs, Sweep, edit_of, read, shaped
from mechjax.transform.transforms import intervene

STREAM_BYTES = 256e6  # streams of all layers' cells that are held at once


@eqx.filter_jit
def all_scores(sweep: Sweep) -> tuple[Array, Array, Array]:
    """Scores of every cell, per example, and the metric of the donor run and of the base run, in one program."""
    runs, grid = sweep.prepare(), sweep.grid
    cells, buckets = grid.cells(), list(grid.buckets())
    parts = [_of_bucket(sweep, runs, cells[which], start) for start, which in buckets]
    order = np.argsort(np.concatenate([which for _, which in buckets]))
    return shaped(grid, jnp.concatenate(parts, 1)[:, order]), runs.of_donor, runs.of_base


def _of_bucket(
    sweep: Sweep, runs: Runs, cells: Int[np.ndarray, "cell axis"], start: int
) -> Float[Array, "layer cell batch"]:
    """Scores of the cells that run from a position on, at every layer that is swept."""
    most, layers = sweep.grid.size_of(start), sweep.grid.layers
    if layers is None:
        return _chunked(lambda c: sweep.scores_of(runs, None, c, start), cells, most)[None]
    if _fits(sweep, even(len(cells), most)[1], start):
        return jnp.moveaxis(
            _chunked(lambda c: jnp.moveaxis(_layers(sweep, runs, c, start), 0, 1), cells, most), 1, 0
        )
    # lax.map keeps a real branch per layer: layers before the start are skipped, in one program.
    layer = lambda at: _chunked(lambda c: sweep.scores_of(runs, at, c, start), cells, most)
    return lax.map(layer, jnp.arange(layers, dtype=jnp.int32))


def _fits(sweep: Sweep, n_cells: int, start: int) -> bool:
    """Whether cells of all layers can run side by side."""
    config, (batch, n_pos) = sweep.model.config, sweep.base.shape
    held = (
        config.n_layers * n_cells * batch * (n_pos - start) * config.d_model * sweep.model.W_E.dtype.itemsize
    )
    return not config.mixed and sweep.site not in EMBEDS | TAIL and held <= STREAM_BYTES


class _One(eqx.Module):
    """One layer, its weights at hand."""

    block: Block
    here: Varying
    layer: Int[Array, ""]
    sequence: Sequence
    before: Prefix | None
    config: Config = eqx.field(static=True)

    def __call__(self, resid: Array) -> Float[Array, "*batch pos d_model"]:
        return self.block(resid, self.sequence, self.here, self.layer, self.config, self.before)[0]


def _layers(
    sweep: Sweep, runs: Runs, cells: Int[Array, "cell axis"], start: int
) -> Float[Array, "layer cell batch"]:
    """The metric of some cells, patched at each layer, all layers side by side."""
    model, last = sweep.model, sweep.model.config.n_layers - 1
    cache = runs.cache if sweep.starts else None
    stream = runs.base[:, ..., start:, :]
    before, sequence = arranged(
        resume(model, 0, cache=cache, start=start), stream[0], sweep.mask if cache is None else None, None
    )

    def one(at: Any) -> _One:
        return _One(*model.of_kind(at, None), jnp.asarray(at, jnp.int32), sequence, before, model.config)

    def patched(one: _One, at: Any) -> Float[Array, "cell *batch pos d_model"]:
        return jax.vmap(lambda cell: intervene(one, [edit_of(sweep, runs, at, cell)])(stream[at]))(cells)

    def layer(streams: Array, at: Array) -> tuple[Array, None]:
        here = one(at)
        on = lambda i, streams: streams.at[i].set(jax.vmap(here)(streams[i]))
        return lax.fori_loop(0, at, on, streams).at[at].set(patched(here, at)), None

    streams = jnp.zeros((last, len(cells), *stream.shape[1:]), stream.dtype)
    streams, _ = lax.scan(layer, streams, jnp.arange(last, dtype=jnp.int32))
    there, none = jnp.maximum(sweep.at - start, 0), jnp.zeros_like(sweep.at)
    of = lambda resid: sweep.metric.of(read(model, resid, none, sweep.columns, unembeds=False))
    found = lax.map(jax.vmap(lambda x: of(last_at(model, x, there, before, sequence))), streams)
    ends = jax.vmap(lambda x: of(read_at(x, there)))(patched(one(last), jnp.int32(last)))
    found = jnp.concatenate([found, ends[None]])
    return jnp.where(sweep.at < start, runs.of_base, found)  # an edit changes nothing before it


def _chunked(fn: Callable[[Array], Array], cells: np.ndarray, most: int) -> Array:
    """`fn` of cells, so many at a time; the last chunk is filled up with repeats."""
    n = len(cells)
    chunks, size = even(n, most)
    if chunks == 1:
        return fn(jnp.asarray(cells))
    filled = cells[np.arange(chunks * size).clip(max=n - 1)].reshape(chunks, size, -1)
    out = lax.map(fn, jnp.asarray(filled))
    return out.reshape(chunks * size, *out.shape[2:])[:n]
