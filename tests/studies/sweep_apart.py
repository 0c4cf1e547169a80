"""A worker of two processes: `python -m tests.studies.sweep_apart INDEX PORT SPEC FOLDER` is one of them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import mechjax as mj
from mechjax.base.errors import MechjaxError


def worker(index, port, spec, folder):
    """One of two processes with two devices each."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    import jax

    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    from mechjax.studies import sweep
    from mechjax.studies.sweep_spec import read_spec

    try:
        did = sweep.run(read_spec(spec), folder)
        sys.stdout.write(f"{len(did.done)} {sweep.result(folder).per_example.shape}\n")
    except MechjaxError as error:
        sys.stdout.write(f"{type(error).__name__}: {error}\n")


def begun(spec, folder):
    """The two processes of a worker."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.studies.sweep_apart", str(i), str(port), str(spec), str(folder)],
            env=os.environ | {"PYTHONPATH": str(Path(mj.__file__).parents[1])},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip


if __name__ == "__main__":
    worker(*sys.argv[1:])
