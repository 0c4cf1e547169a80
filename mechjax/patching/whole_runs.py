"""A sweep of any function with sites: every cell is a run of all of it.

Only of a decoder is it known what stands before a layer, so that it need not run again. Here the cells of a chunk are
one batched run, whose axis of cells begins at the first layer of the site: what comes before that is run once for all.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.digests import arrays_digest, lasts, tree_digest
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.base.inputs import Inputs
from mechjax.interop.unmapped import unmapped
from mechjax.metrics.of_output import OfOutput, Reads, of_output
from mechjax.models.room import at_once
from mechjax.patching.grid import Grid, even
from mechjax.patching.sweep import shaped
from mechjax.transform.cost import jaxpr_cost, traced
from mechjax.transform.digest import program_digest
from mechjax.transform.edits import replace
from mechjax.transform.finite import check_sites_finite
from mechjax.transform.select import is_concrete
from mechjax.transform.swept import named_positions, swept_axes, swept_site
from mechjax.transform.table import SiteInfo
from mechjax.transform.transforms import capture, intervene


class WholeRuns(eqx.Module):
    """What cells need of the two runs.

    Attributes:
        donor: The activations that are put in: all layers of them, for a site that has layers.
        of_donor: The metric of the run that they come from.
        of_base: That of the run that they are put into.
    """

    donor: Array
    of_donor: Float[Array, " batch"]
    of_base: Float[Array, " batch"]


class WholeSweep(eqx.Module):
    """What is swept, checked.

    Attributes:
        run: The metric of a run of the function.
        donor: The inputs of the run that activations come from.
        base: Those of the run that they are put into.
        named: Named positions, in place of every column. Shape (name, batch).
        info: The site that is patched (static).
        over: The axes that are swept (static).
        sizes: Their lengths, without the layer's (static).
        chunk: Cells that run at once (static).
        examples: How many examples there are (static).
    """

    run: OfOutput
    donor: Inputs
    base: Inputs
    named: Int[Array, "name batch"] | None
    info: SiteInfo = eqx.field(static=True)
    over: tuple[str, ...] = eqx.field(static=True)
    sizes: tuple[int, ...] = eqx.field(static=True)
    chunk: int = eqx.field(static=True)
    examples: int = eqx.field(static=True)

    @property
    def site(self) -> str:
        """Its name."""
        return self.info.name

    @property
    def grid(self) -> Grid:
        """The cells that are swept."""
        layers = len(self.info.rows) if "layer" in self.over else None
        return Grid(layers, self.over, self.sizes, (), self.chunk, 1)

    @eqx.filter_jit
    def prepare(self) -> WholeRuns:
        """Run both sides."""
        of_donor, acts = capture(self.run, [self.site])(self.donor)
        return WholeRuns(acts[self.site], of_donor, self.run(self.base))

    @eqx.filter_jit
    def scores_of(self, runs: WholeRuns, layer: Any, cells: Array, start: int) -> Float[Array, "cell batch"]:
        """The metric of some cells of one layer, per example, all at once."""
        rows = None if layer is None else jnp.broadcast_to(layer, cells.shape[:1])
        return self._patched(runs, rows, cells)

    def _patched(
        self, runs: WholeRuns, rows: Int[Array, " cell"] | None, cells: Int[Array, "cell axis"]
    ) -> Float[Array, "cell batch"]:
        layers = jnp.asarray(self.info.rows, jnp.int32)

        def cell(row: Array | None, index: Array) -> Array:
            where: dict[str, Any] = dict(zip(self.grid.swept, index, strict=True))
            if self.named is not None:
                where["pos"] = self.named[where["pos"]][:, None]  # one position per example
            layer = None if row is None else layers[row]
            edit = replace(self.site, runs.donor, per_layer=self.info.stacked, layer=layer, **where)
            return intervene(self.run, [edit])(self.base)

        return jax.vmap(cell, in_axes=(None if rows is None else 0, 0))(rows, cells)

    @eqx.filter_jit
    def all_scores(self) -> tuple[Array, Array, Array]:
        """Scores of every cell, per example, and the metric of the donor run and of the base run, in one program."""
        runs, grid = self.prepare(), self.grid
        cells = np.repeat(grid.cells()[None].astype(np.int32), grid.layers or 1, 0)
        rows = np.repeat(np.arange(len(cells), dtype=np.int32), cells.shape[1])
        cells = cells.reshape(len(rows), -1)
        chunks, size = even(len(rows), self.chunk)
        filled = np.arange(chunks * size).clip(max=len(rows) - 1)  # the last chunk is filled up with repeats

        def chunk(which: tuple[Array, Array]) -> Array:
            return self._patched(runs, which[0] if grid.layers is not None else None, which[1])

        given = (jnp.asarray(rows[filled]), jnp.asarray(cells[filled]))
        given = jax.tree.map(lambda x: x.reshape(chunks, size, *x.shape[1:]), given)
        scores = lax.map(chunk, given).reshape(chunks * size, -1)[: len(rows)]
        scores = scores.reshape(grid.layers or 1, -1, self.examples)
        return shaped(grid, scores), runs.of_donor, runs.of_base

    def check(self, *found: Array) -> None:
        """Whether metrics are numbers, where that can be seen.

        Raises:
            ArgumentError: Some are NaN. The first site that is not finite is named, in either run.
        """
        if not any(is_concrete(x) and bool(jnp.isnan(x).any()) for x in found):
            return
        for side in (self.base, self.donor):
            check_sites_finite(self.run, side)
        raise ArgumentError(
            "some metrics are NaN, though every site is finite in the runs without patches: the metric gives NaN, a "
            "named position is out of range, or the patched run overflows (half precision?)."
        )

    def said(self, model: str | None) -> dict[str, Any]:
        """What tells this sweep from others, in a folder; the checksum of the model, where it is known.

        Raises:
            ArgumentError: A function of which another process cannot tell whether it is the same.
        """
        fn, metric, base = self.run.fn, self.run.metric, self.base
        return {
            "model": model or _told(fn, fn, *base.args, **base.kwargs),
            "donor": tree_digest(self.donor),
            "base": tree_digest(base),
            "metric": f"{type(metric).__qualname__} {_told(metric, self.run, base)}",
            "shape": [self.examples, 1],
        }


def _told(part: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """A checksum of a function or metric: where its place in memory alone tells it from others, of a program it is in.

    Raises:
        ArgumentError: The program calls back into Python.
    """
    if lasts(part):
        return tree_digest(part)
    if (program := program_digest(run, *args, **kwargs)) is None:
        raise ArgumentError(
            "folder= keeps a sweep for other processes, and this function or metric calls back into Python "
            "(`jax.pure_callback` or one of its kind), so that no checksum says what it computes. Write what it does "
            "there in JAX, or leave `folder` out."
        )
    return f"{program} {arrays_digest(part)}"


def whole_sweep(
    fn: Callable[..., Any], donor: Inputs, base: Inputs, metric: Reads, *, site: str, over: Sequence[str],
    positions: Mapping[str, Any] | None, chunk_size: int | None, room: float,
) -> WholeSweep:  # fmt: skip
    """The sweep that `activation_patch` runs of a function; `room` is the bytes that its cells may hold together.

    Raises:
        SiteError: A site or axis that the function does not have, layers of which it is not known how many there are,
            or positions of a site whose examples are not its first axis.
        ShapeError, ArgumentError: As `of_output`, and named positions that are not one per example.
    """
    run = of_output(unmapped(fn), metric, base)
    n_examples = eqx.filter_eval_shape(run, base).shape[0]
    info = swept_site(run, site, base)
    axes = swept_axes(info, over, positions)
    if info.stacked and not info.rows:
        raise SiteError(
            f"site `{info.name}` stands in a while_loop, so how many layers there are is not known. Say it: "
            "site(x, name, layer=i, layers=n)."
        )
    named = named_positions(positions, n_examples, info)
    sizes = tuple(len(positions) if a == "pos" and positions else info.size(a) for a in axes)
    layers = len(info.rows) if "layer" in over else 1
    chunk = chunk_size or runs_of(room, run, base)
    return WholeSweep(
        run,
        donor,
        base,
        named,
        info,
        tuple(over),
        sizes,
        min(chunk, max(1, layers * math.prod(sizes))),
        n_examples,
    )


def runs_of(n_bytes: float, run: OfOutput, given: Inputs) -> int:
    """How many runs fit in some bytes, by what one holds at once as it is traced."""
    return at_once(n_bytes, max(1, jaxpr_cost(traced(run, given)).peak_bytes))
