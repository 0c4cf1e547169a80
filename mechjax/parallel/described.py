"""Programs compiled for TPUs that are not here: how much memory each chip would need.

`libtpu` compiles for a described topology on any Linux machine. It does so in a process of its own, which sees no
devices but the CPU, so that a TPU that is attached, and in use, is left alone.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mechjax.base.encoding import decode, encode
from mechjax.base.errors import ArgumentError
from mechjax.base.optional import require
from mechjax.base.records import Record

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip
# The last: libtpu is for one process at a time, whether or not that touches a chip.
_CHILD = "from mechjax.parallel.described import answer; answer()"
_SECONDS = 600
_MARK = "mechjax: "  # the one line of the child's output that is its answer
AXES = ("data", "model")


class ChipMemory(Record):
    """What one chip of a described topology must hold, as its compiler says. All fields are static.

    Attributes:
        chip: The topology that was described, such as "v5e:2x4".
        kind: What JAX calls such a chip.
        mesh: How many chips along `data` and along `model`.
        fits: Whether the program compiles within a chip's memory.
        arguments: Bytes of its arguments (weights and tokens); None where it does not fit.
        outputs: Bytes of its outputs (logits and what is captured); None where it does not fit.
        temporaries: Bytes in between; None where it does not fit.
        problem: What the compiler says where it does not fit.
    """

    chip: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    mesh: tuple[int, int] = eqx.field(static=True)
    fits: bool = eqx.field(static=True)
    arguments: int | None = eqx.field(static=True, default=None)
    outputs: int | None = eqx.field(static=True, default=None)
    temporaries: int | None = eqx.field(static=True, default=None)
    problem: str = eqx.field(static=True, default="")

    @property
    def total(self) -> int | None:
        """Bytes in all."""
        if self.arguments is None or self.outputs is None or self.temporaries is None:
            return None
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Placed:
    """An array by its shape, and the mesh axis that each dimension is split over; no pytree, so a leaf.

    Attributes:
        shape: Its shape.
        dtype: Name of its dtype.
        spec: For each dimension `"data"`, `"model"` or None.
    """

    shape: tuple[int, ...]
    dtype: str
    spec: tuple[str | None, ...]


def memory_per_chip(call: Sequence[Any], chip: str, mesh: tuple[int, int] | None = None) -> ChipMemory:
    """Compile a call for a described TPU, and read what memory each chip needs.

    Args:
        call: The callable and its arguments, a pytree whose arrays are `Placed`. Whatever else is in it must be
            something that a record can hold: it is sent to another process, where nothing is unpickled.
        chip: A topology, such as `"v5e:2x4"`, `"v6e:4x4"`, `"v5p:2x2x1"`.
        mesh: Chips along `data` and along `model`; by default all along `model`.

    Raises:
        MissingExtraError: libtpu is not installed.
        ArgumentError: An unknown topology, a mesh of another size, or a callable that cannot be sent.
    """
    require("libtpu", extra="tpu-aot")
    try:
        sent = encode(list(call), "", {})
    except ArgumentError as error:
        raise ArgumentError(
            f"chip={chip!r} compiles in a process of its own, which can be sent models and edits of mechjax, but no "
            f"functions: {error}"
        ) from None
    question = {"chip": chip, "mesh": mesh, "call": sent, "x64": bool(jax.config.read("jax_enable_x64"))}
    done = subprocess.run(
        [sys.executable, "-c", _CHILD], input=json.dumps(question), capture_output=True, text=True,
        env=environment(), timeout=_SECONDS, check=False,
    )  # fmt: skip
    said = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not said:
        raise ArgumentError(
            f"compiling for chip={chip!r} failed: {' '.join(done.stderr.split())[-600:]} Check that libtpu belongs to "
            "the installed jax (`mechjax doctor`)."
        )
    found = json.loads(said[-1].removeprefix(_MARK))
    if "refused" in found:
        raise ArgumentError(found["refused"])
    return ChipMemory(**{**found, "mesh": tuple(found["mesh"])})


def environment() -> dict[str, str]:
    """The variables of a process that compiles for chips that are not here, and leaves those alone that are.

    Flags of XLA that are for CPUs and GPUs are left out: libtpu ends the process for one that it does not know.
    """
    own = str(Path(__file__).parents[2])
    paths = os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = " ".join(flag for flag in flags if not flag.startswith(("--xla_cpu_", "--xla_gpu_")))
    return {**os.environ, **_ENVIRONMENT, "PYTHONPATH": paths, "XLA_FLAGS": kept}


def answer() -> None:
    """The other process: read the question from stdin, compile, write the answer to stdout."""
    question = json.load(sys.stdin)
    jax.config.update("jax_enable_x64", question["x64"])
    sys.stdout.write(f"{_MARK}{json.dumps(_compiled(**question))}\n")


def _compiled(chip: str, mesh: list[int] | None, call: Any, x64: bool) -> dict[str, Any]:
    from jax.experimental import topologies

    try:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices
    except jax.errors.JaxRuntimeError as error:
        return {
            "refused": f"chip={chip!r} is no topology that libtpu knows ({error}); one is spelled `v5e:2x4`."
        }
    sizes = tuple(mesh) if mesh is not None else (1, len(chips))
    if math.prod(sizes) != len(chips):
        return {
            "refused": f"mesh={sizes} has {math.prod(sizes)} chips, chip={chip!r} has {len(chips)}. Make them equal."
        }
    devices = jax.sharding.Mesh(np.array(chips).reshape(sizes), AXES)

    def place(x: Placed) -> jax.ShapeDtypeStruct:
        where = jax.sharding.NamedSharding(devices, jax.sharding.PartitionSpec(*x.spec))
        return jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=where)

    leaves, tree = jax.tree.flatten(decode(call, {}))
    arrays = [place(x) if isinstance(x, Placed) else x for x in leaves]
    program = jax.jit(lambda given: _outputs(jax.tree.unflatten(tree, given)))
    found = {"chip": chip, "kind": chips[0].device_kind, "mesh": sizes}
    try:
        memory = cast(Any, program.lower(arrays).compile().memory_analysis())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {**found, "fits": False, "problem": str(error).partition("\n")[0]}
    return {
        **found, "fits": True, "arguments": memory.argument_size_in_bytes - memory.alias_size_in_bytes,
        "outputs": memory.output_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
    }  # fmt: skip


def _outputs(call: Sequence[Any]) -> list[Any]:
    fn, *args = call
    return [x for x in jax.tree.leaves(fn(*args)) if eqx.is_array_like(x)]
