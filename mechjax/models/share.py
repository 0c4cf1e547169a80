"""What one of several devices holds of a call, from shapes and from the table that says what a mesh splits.

Parameters are exact (`parallel/layout`). What lies in between is an estimate, from the traced program: an array counts
as split where one of its sizes is that of something the mesh splits (the batch; heads, neurons, experts, vocabulary).
A described TPU (`plan(chip=)`) is what a compiler says.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import equinox as eqx
import jax

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.base.units import in_bytes
from mechjax.parallel.hardware import hardware
from mechjax.parallel.layout import RULES, Spec, layout, split
from mechjax.transform.cost import peak

_ENDLESS = 1 << 20  # things at once, past which no more are looked for
Sizes = tuple[int, int] | Mapping[str, int] | None
"""A mesh: devices along `data` and `model`, or along each of its axes by name."""


class Share(Record):
    """What one device holds. All fields are static.

    Attributes:
        devices: The devices that were described.
        mesh: The axes of the mesh and how many devices each has.
        room: Bytes that a program can have on one.
        params: Bytes of its part of the parameters.
        between: Bytes of what is alive at once beside them, outputs included: an estimate.
        largest: How many that is split or chunked (`what`) would fit; None where all fits.
        what: What `largest` counts, such as "batch".
    """

    devices: str = eqx.field(static=True)
    mesh: tuple[tuple[str, int], ...] = eqx.field(static=True)
    room: int = eqx.field(static=True)
    params: int = eqx.field(static=True)
    between: int = eqx.field(static=True)
    largest: int | None = eqx.field(static=True, default=None)
    what: str = eqx.field(static=True, default="batch")

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.params + self.between

    @property
    def fits(self) -> bool:
        """Whether that is no more than a device has for a program."""
        return self.total <= self.room

    def spec(self, axes: tuple[str, ...], shape: tuple[int, ...]) -> Spec:
        """Which axes of the mesh split each dimension of an activation whose axes have these names."""
        return split(axes, shape, dict(self.mesh))

    def said(self) -> str:
        """In one sentence."""
        mesh = " × ".join(f"{axis}={n}" for axis, n in self.mesh)
        parts = f"parameters {in_bytes(self.params)}, in between about {in_bytes(self.between)}"
        verdict = f"about {in_bytes(self.total)} of {in_bytes(self.room)} on {self.devices} ({mesh}): {parts}"
        if self.fits:
            return f"fits, {verdict}"
        would = (
            f"{self.what}={self.largest} would" if self.largest else f"no {self.what} would: split it further"
        )
        return f"does not fit, {verdict}; {would}"

    def __repr__(self) -> str:
        return f"Share: {self.said()}"


def shared(
    devices: str, mesh: Sizes, arrays: Any, batch: int, program: Callable[[int], Any], *, what: str = "batch",
    now: int | None = None,
) -> Share:  # fmt: skip
    """What one device holds.

    Args:
        devices: Such as "v5e-256" or "8xH200".
        mesh: How they are arranged; None gives the model as many as divide it, and the others to the batch.
        arrays: The model by shapes.
        batch: Examples of the call.
        program: The traced program for a number of examples, or of whatever `what` counts.
        what: What may be made smaller where all does not fit.
        now: How many of these there are; the batch by default.

    Raises:
        ArgumentError: Devices that are not known, or a mesh that has another number or does not divide.
    """
    found = hardware(devices)
    sizes = arranged(mesh, arrays, batch, found.n, f"devices={devices!r}")
    params = sum(
        _part(x, spec, sizes) for x, spec in zip(jax.tree.leaves(arrays), _specs(arrays, sizes), strict=True)
    )
    by = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp"))
    if batch % by:
        raise ArgumentError(
            f"A batch of {batch} cannot be divided over {by} devices (mesh={sizes}): give a multiple."
        )
    number = batch if now is None else now
    between = lambda n: peak(program(n), _estimate(arrays, sizes, n if what == "batch" else batch))
    held = partial(Share, devices, tuple(sizes.items()), found.room, params)
    if (first := held(between(number))).fits:
        return first
    step = by if what == "batch" else 1
    return held(first.between, step * _most(lambda n: held(between(step * n)).fits, number // step), what)


def _most(fits: Callable[[int], bool], below: int) -> int:
    """The largest number that fits, by halving; 0 where 1 does not. `below` is known not to fit, or 0."""
    low, high = 0, below
    while high == 0 and low < _ENDLESS:
        low, high = (max(1, 2 * low), 0) if fits(max(1, 2 * low)) else (low, max(1, 2 * low))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def arranged(mesh: Sizes, arrays: Any, batch: int, n: int, said: str) -> dict[str, int]:
    """The axes of a mesh over `n` devices, checked; where None was given, as many divide the model as can.

    Raises:
        ArgumentError: An unknown axis, sizes that are not positive, or another number of devices.
    """
    if mesh is None:
        n_data, n_model = _divided(arrays, batch, n)
        return {"data": n_data, "model": n_model}
    sizes: dict[str, int] = {}
    sizes |= zip(("data", "model"), mesh, strict=True) if isinstance(mesh, tuple) else mesh
    if unknown := [axis for axis in sizes if axis not in RULES]:
        raise ArgumentError(f"mesh={sizes}: `{unknown[0]}` is no axis; there are {', '.join(RULES)}.")
    if min(sizes.values()) < 1:
        raise ArgumentError(f"mesh={mesh}: all sizes must be positive.")
    if (total := math.prod(sizes.values())) != n:
        raise ArgumentError(f"mesh={mesh} has {total} devices, {said} has {n}. Make them equal.")
    return sizes


def _divided(arrays: Any, batch: int, n: int) -> tuple[int, int]:
    """How many of `n` devices divide the batch and how many the model: of the model's, the most that divide it."""
    for n_model in (size for size in range(n, 0, -1) if n % size == 0 and batch % (n // size) == 0):
        try:
            specs = _specs(arrays, {"model": n_model})
        except ArgumentError:
            continue
        if n_model == 1 or any(
            "model" in spec for spec in specs
        ):  # a model without names is whole everywhere
            return n // n_model, n_model
    return 1, n


def _specs(arrays: Any, sizes: Mapping[str, int]) -> list[Spec]:
    return jax.tree.leaves(layout(arrays, sizes), is_leaf=lambda x: isinstance(x, tuple))


def _part(x: Any, spec: Spec, sizes: Mapping[str, int]) -> int:
    """Bytes of one device's part of an array."""
    axes = [axis for over in spec for axis in ((over,) if isinstance(over, str) else over or ())]
    return math.prod(x.shape) * x.dtype.itemsize // math.prod(sizes[axis] for axis in axes)


def _estimate(arrays: Any, sizes: Mapping[str, int], batch: int) -> Callable[[Any], int]:
    """Bytes of one device's part of an array of the program, by its sizes alone."""
    config = next(
        (c for c in (getattr(m, "config", None) for m in (arrays, getattr(arrays, "fn", None))) if c), None
    )
    names = ("n_heads", "n_kv_heads", "d_mlp", "d_vocab")
    wide = {n for n in (getattr(config, name, 0) for name in names) if n}
    if (experts := getattr(config, "experts", None)) is not None:
        wide |= {experts.n_experts, experts.d_expert}
    by_batch = math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "sequence"))
    by_model = math.prod(sizes.get(axis, 1) for axis in ("model", "tensor", "expert"))

    def of(aval: Any) -> int:
        parts = by_batch if batch in aval.shape[:-1] or aval.shape[:1] == (batch,) else 1
        parts *= by_model if any(n in wide and n % by_model == 0 for n in aval.shape) else 1
        return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0) // parts

    return of
