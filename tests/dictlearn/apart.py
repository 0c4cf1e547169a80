"""Runs in processes of their own: `python -m tests.dictlearn.apart NAME...`.

`worker ID PORT FILE` is one of two processes that share a mesh of eight devices; `tpu` compiles a step for chips that
are not here.
"""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import mechjax as mj
from tests.parallel.for_tpu import ENVIRONMENT

STEPS, B, D, F, K = 6, 16, 12, 80, 4


def begun(key):
    """What both runs begin with."""
    return mj.dictionaries.BatchTopK.init(d_model=D, n_features=F, k=K, key=key)


def batches():
    """Batches that every process has whole."""
    import jax

    return [jax.device_get(jax.random.normal(jax.random.key(i), (B, D))) + 1 for i in range(STEPS)]


def trained(mesh):
    """A short run, also through tokens' silence and AuxK."""
    import jax

    key = jax.random.key(0)
    return mj.dictlearn.train(
        begun(key),
        batches(),
        steps=STEPS,
        learning_rate=1e-3,
        key=key,
        steps_per_call=3,
        dead_after=2 * B,
        mesh=mesh,
    )


def worker(index, port, path):
    """One of two processes; the first writes what was found."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    found = trained(mj.make_mesh(data=2, model=4))
    W = found.dictionary.W_dec
    if W.is_fully_addressable or len(W.sharding.device_set) != 8:
        raise SystemExit("the decoder does not lie on the devices of both processes")
    whole = multihost_utils.process_allgather(found.dictionary, tiled=True)
    if index == "0":
        np.savez(path, W_enc=whole.W_enc, W_dec=whole.W_dec, b_dec=whole.b_dec, threshold=whole.threshold,
                 loss=np.asarray(found.history["loss"]))  # fmt: skip


def two_processes(path):
    """What two processes found, and what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = [_process("worker", str(i), str(port), str(path)) for i in range(2)]
    said = [run.communicate(timeout=240)[1] for run in runs]
    return [run.returncode for run in runs], "\n".join(said)[-3000:]


def tpu():
    """Compiles steps of three kinds for eight chips and says what crosses between them."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from mechjax.dictlearn.loop import advance
    from mechjax.dictlearn.placement import _with_specs
    from mechjax.dictlearn.plan import planned
    from mechjax.dictlearn.step import begun as state_of

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4")
    mesh = Mesh(np.array(chips.devices).reshape(2, 4), ("data", "model"))
    plan = planned(10, 2, 1e-3, 0, 0.3, 0.0, None, 1000, None)
    key, kinds = jax.random.key(0), mj.dictionaries
    size = {"d_model": 256, "n_features": 4096, "key": key}
    tokens = 512
    there = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
    for kind in (
        kinds.TopK.init(k=32, **size),
        kinds.BatchTopK.init(k=32, **size),
        kinds.JumpReLU.init(**size),
    ):
        state = _with_specs(there, state_of(kind, plan.optimizer), plan.optimizer, 4)
        x = there(jnp.zeros((2, tokens, 256)), P(None, "data"))
        arrays, static = eqx.partition(state, lambda x: isinstance(x, jax.ShapeDtypeStruct))
        run = jax.jit(lambda arrays, x, static=static: jax.tree.leaves(
            advance((plan, jnp.ones(2), jnp.int32(0)), (x, None), eqx.combine(arrays, static))
        ))  # fmt: skip
        with jax.set_mesh(mesh):
            text = run.lower(arrays, x).compile().as_text()
        gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
        most = max((np.prod([int(n) for n in shape.split(",") if n]) for shape in gathered), default=0)
        sums = len(re.findall(r"all-reduce(?:-start)?\(", text))
        sys.stdout.write(f"{type(kind).__name__} {int(most)} {sums}\n")
        sys.stdout.flush()


def compiled_for_tpu():
    """Kind -> numbers of the largest gathered array and of sums between chips; and what was said."""
    run = _process("tpu", **ENVIRONMENT)
    out, said = run.communicate(timeout=280)
    rows = (line.split() for line in out.splitlines())
    return {name: (int(most), int(sums)) for name, most, sums in rows}, said[-3000:]


def _process(*names, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.dictlearn.apart", *names],
        env=os.environ | environment | {"PYTHONPATH": str(Path(mj.__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


if __name__ == "__main__":
    {"worker": worker, "tpu": tpu}[sys.argv[1]](*sys.argv[2:])
