"""Device meshes."""

import math

import jax
from jax.sharding import AxisType, Mesh

from mechjax.base.errors import ArgumentError, did_you_mean
from mechjax.base.meshes import automatic
from mechjax.parallel.layout import RULES


def make_mesh(
    *, data: int | None = None, model: int = 1, fsdp: int = 1, sequence: int = 1, expert: int = 1
) -> Mesh:
    """A mesh with axes `data` (examples) and `model` (heads, neurons, features), and others where they are asked for.

    Auto axes let the compiler place what lies between annotated inputs, so models need no annotations inside.
    Devices that are neighbours lie along the last axes: what sums most often, `model`, stays on one host.

    Args:
        data: Devices along `data`; None takes all that the others leave.
        model: Devices along `model`.
        fsdp: Devices that share examples and weights too.
        sequence: Devices that share the positions of prompts.
        expert: Devices that share experts.

    Returns:
        The mesh, over the first devices. Axes other than `data` and `model` are there where they are larger than 1.

    Raises:
        ArgumentError: Sizes that are not positive, or more than there are devices.
    """
    devices = jax.devices()
    given = {"data": data, "fsdp": fsdp, "sequence": sequence, "expert": expert, "model": model}
    said = ", ".join(f"{axis}={n}" for axis, n in given.items() if axis in ("data", "model") or n != 1)
    if min(n for n in given.values() if n is not None) < 1:
        raise ArgumentError(f"make_mesh({said}): sizes must be positive.")
    others = math.prod(n for n in given.values() if n is not None)
    if data is None:
        if len(devices) % others:
            raise ArgumentError(
                f"make_mesh({said}): {len(devices)} devices cannot be split into rows of {others}; choose a "
                "divisor, or say data= too."
            )
        data, others = len(devices) // others, len(devices)
    if others > len(devices):
        raise ArgumentError(f"make_mesh({said}) needs {others} devices; {len(devices)} are here.")
    sizes = {axis: n or data for axis, n in given.items() if axis in ("data", "model") or n != 1}
    return jax.make_mesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
        devices=devices[:others],
    )


def accepted(mesh: Mesh) -> Mesh:
    """The mesh, with Auto axes whatever it had, where its axes are known.

    Raises:
        ArgumentError: An axis that no rule of `mechjax.parallel.layout` knows.
    """
    for axis in mesh.axis_names:
        if axis not in RULES:
            raise ArgumentError(
                f"the mesh has an axis `{axis}`, and nothing says what it splits: axes are {', '.join(RULES)}."
                f"{did_you_mean(str(axis), RULES)} `mj.make_mesh(data=2, model=4)` makes a mesh."
            )
    return automatic(mesh)


def n_model() -> int:
    """Into how many parts the mesh in whose context this runs splits `model`; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else dict(mesh.shape).get("model", 1)
