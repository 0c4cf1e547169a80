"""Where the spans of a graph are in each prompt."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.whole import whole
from mechjax.graph.build import Graph
from mechjax.transform.select import is_concrete


def spans_of(
    graph: Graph, positions: Mapping[str, Any] | None, shape: tuple[int, ...]
) -> Int[Array, "*batch pos"] | None:
    """The span that each position of each prompt is in, -1 for none; None where the graph sums positions.

    Args:
        graph: The graph.
        positions: For each name of the graph's spans, one position per example (batch,), as many as there are
            (batch, n), or a mask (batch, pos) that is True inside; negative ones count from the end. None where the
            graph has every position by its number.
        shape: That of the prompts, (*batch, pos).

    Raises:
        ArgumentError: Names that are not the graph's, positions that are in two spans, or that there are not.
        ShapeError: Prompts of another length than the graph's, or positions for another number of examples.
    """
    *batch, n_pos = shape
    if not graph.spans or not graph.named:
        if positions is not None:
            apart = "every position by its number" if graph.spans else "positions summed"
            raise ArgumentError(
                f"positions= says where {', '.join(map(repr, positions)) or 'nothing'} is, and this graph has {apart}: "
                "name spans when building it, mj.graph.build(model, positions=('subject', 'END'))."
            )
        if graph.spans and n_pos != len(graph.spans):
            raise ShapeError(
                f"the graph has {len(graph.spans)} positions and the prompts {n_pos}: build it for their length, "
                f"mj.graph.build(model, positions={n_pos})."
            )
        return jnp.broadcast_to(jnp.arange(n_pos, dtype=jnp.int32), shape) if graph.spans else None
    if positions is None or set(positions) != set(graph.spans):
        raise ArgumentError(
            f"the graph has the spans {', '.join(map(repr, graph.spans))}, and positions= names "
            f"{', '.join(map(repr, positions or ())) or 'none'}: say of each, and of no other, where it is."
        )
    found = jnp.full(shape, -1, jnp.int32)
    for number, name in enumerate(graph.spans):
        inside = _inside(name, positions[name], tuple(batch), n_pos)
        twice = inside & (found >= 0)
        if is_concrete(twice) and bool(twice.any()):
            where = np.argwhere(whole(twice))[0]
            other = graph.spans[int(whole(found)[tuple(where)])]
            raise ArgumentError(
                f"position {where[-1]} of example {', '.join(map(str, where[:-1]))} is in `{other}` and in `{name}`: "
                "an edge at a position is in one span."
            )
        found = jnp.where(inside, number, found)
    return found


def _inside(name: str, at: Any, batch: tuple[int, ...], n_pos: int) -> Array:
    """Whether each position is in a span."""
    at = jnp.asarray(at)
    if at.dtype == bool:
        if at.shape != (*batch, n_pos):
            raise ShapeError(
                f"the mask of `{name}` has shape {at.shape}; that of the prompts is {(*batch, n_pos)}."
            )
        return at
    if (
        not jnp.issubdtype(at.dtype, jnp.integer)
        or at.shape[: len(batch)] != batch
        or at.ndim > len(batch) + 1
    ):
        raise ShapeError(
            f"`{name}` has shape {at.shape} and type {at.dtype}: give one position per example, {batch}, several, "
            f"{(*batch, 'n')}, or a mask, {(*batch, n_pos)}."
        )
    if is_concrete(at) and bool(((at < -n_pos) | (at >= n_pos)).any()):
        raise ArgumentError(f"`{name}` has a position that prompts of {n_pos} tokens do not have.")
    at = jnp.where(at < 0, at + n_pos, at).astype(jnp.int32).reshape(*batch, -1)
    return (at[..., None] == jnp.arange(n_pos, dtype=jnp.int32)).any(-2)
