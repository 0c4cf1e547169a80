"""One of two processes that share a mesh of eight devices: `python -m tests.artefacts.apart ID PORT FOLDER`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

SHAPE = (8, 6)


def worker(index, port, folder):
    """Tells where spread arrays come from, and saves a checkpoint together with the other process."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    import jax
    import numpy as np

    import mechjax as mj
    from mechjax.base.digests import tree_digest
    from mechjax.base.provenance import provenance_of

    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    mesh, whole = mj.make_mesh(data=2, model=4), np.arange(48, dtype=np.float32).reshape(SHAPE)
    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    put = lambda where: jax.make_array_from_callback(SHAPE, where, lambda at: whole[at])
    spread, copied = put(place("data")), put(place())
    made = {"spread": spread, "copied": copied, "seed": 3}
    told = {"page": provenance_of(**made).page(), "together": tree_digest(spread)}
    (folder / f"{index}.json").write_text(json.dumps(told))
    mj.fit.save_checkpoint(folder / "run", 5, {"w": spread, "b": copied}, made_from=made)


def two_processes(folder):
    """Both, to their end: their exit codes and what they said."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.artefacts.apart"]
    both = [
        subprocess.Popen(
            [*command, str(i), str(port), folder], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for i in range(2)
    ]
    said = []
    try:
        said = [process.communicate(timeout=120)[0].decode() for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], "\n".join(said)[-4000:]


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
