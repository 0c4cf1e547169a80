"""Device meshes."""

import jax
from jax.sharding import AxisType, Mesh

from mechjax.base.errors import ArgumentError


def make_mesh(*, data: int | None = None, model: int = 1) -> Mesh:
    """A mesh with axes `data` (examples) and `model` (heads, neurons, features), both Auto.

    Auto axes let the compiler place what lies between annotated inputs, so models need no annotations inside.

    Args:
        data: Devices along `data`; None takes all that `model` leaves.
        model: Devices along `model`.

    Returns:
        The mesh, over the first `data * model` devices.

    Raises:
        ArgumentError: sizes that are not positive, or more than there are devices.
    """
    devices = jax.devices()
    if model < 1 or (data is not None and data < 1):
        raise ArgumentError(f"make_mesh(data={data}, model={model}): sizes must be positive.")
    if data is None:
        if len(devices) % model:
            raise ArgumentError(
                f"make_mesh(model={model}): {len(devices)} devices cannot be split into rows of {model}; choose a "
                "divisor, or say data= too."
            )
        data = len(devices) // model
    if data * model > len(devices):
        raise ArgumentError(
            f"make_mesh(data={data}, model={model}) needs {data * model} devices; {len(devices)} are here."
        )
    return jax.make_mesh(
        (data, model),
        ("data", "model"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: data * model],
    )


def n_model() -> int:
    """Into how many parts the mesh in whose context this runs splits `model`; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else dict(mesh.shape).get("model", 1)
