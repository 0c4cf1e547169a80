"""Where a case's arrays lie: on one device, on a mesh that we made, or on one that users made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding

import mechjax as mj
from mechjax.parallel.layout import layout
from tests.parallel.rows import Case, case
from tests.tolerances import TOL

SIZES = {"data": 2, "model": 4}


def here(value: Any, axes: str | None = None) -> Any:
    """As it is."""
    return value


def split(mesh: Any) -> Callable[..., Any]:
    """What puts things on a mesh as `mj.shard` does."""
    return lambda value, axes=None: mj.shard(value, mesh, axes=axes)


def by_a_user(mesh: Any) -> Callable[..., Any]:
    """What puts things on a mesh with Explicit axes, split alike."""
    ours = mj.make_mesh(**{axis: mesh.shape[axis] for axis in mesh.axis_names})
    there = lambda x: jax.device_put(x, NamedSharding(mesh, x.sharding.spec)) if eqx.is_array(x) else x
    return lambda value, axes=None: jax.tree.map(there, mj.shard(value, ours, axes=axes))


def alone(folder: Path) -> Case:
    """Everything on one device."""
    return case(here, None, folder)


def automatic(folder: Path) -> Case:
    """On the mesh of `mj.make_mesh`."""
    mesh = mj.make_mesh(**SIZES)
    return case(split(mesh), mesh, folder)


def explicit(folder: Path) -> Case:
    """On the mesh of `jax.make_mesh`."""
    mesh = jax.make_mesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Explicit,) * len(SIZES))
    return case(by_a_user(mesh), mesh, folder)


def assert_split(c: Case) -> None:
    """Weights lie in quarters but for what is small, prompts in halves, over all devices of all processes."""
    weights = jax.tree.leaves(eqx.filter(c.model, eqx.is_array))
    specs = jax.tree.leaves(layout(c.model, SIZES), is_leaf=lambda x: isinstance(x, tuple))
    small = sum(x.nbytes for x, spec in zip(weights, specs, strict=True) if "model" not in spec)
    total = sum(x.nbytes for x in weights)
    held = dict.fromkeys(jax.local_devices(), 0)
    for x in weights:
        for shard in x.addressable_shards:
            held[shard.device] += shard.data.nbytes
    if small > 0.12 * total or max(held.values()) > small + (total - small) // 4 or not min(held.values()):
        raise AssertionError(f"of {total} bytes, {small} whole, devices hold {held}")
    for ids in c.pair:
        parts = {shard.data.nbytes for shard in ids.addressable_shards}
        if parts != {ids.nbytes // 2} or len(ids.sharding.device_set) != 8:
            raise AssertionError(f"prompts lie in parts of {parts} bytes of {ids.nbytes}")


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """As many arrays with the same numbers."""
    for one, two in zip(found, expected, strict=True):
        assert one.shape == two.shape and one.dtype == two.dtype
        np.testing.assert_allclose(one, two, **TOL["float32", "mesh"])
