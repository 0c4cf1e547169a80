"""Runs in processes of their own: `python -m tests.dictlearn.apart NAME...`.

`worker ID PORT FILE` is one of two processes that share a mesh of eight devices; `tpu` compiles a step for chips that
are not here; `kept FOLDER FILE STEPS` is a run that may be killed.
"""

import contextlib
import hashlib
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.parallel.described import environment as for_tpu

STEPS, B, D, F, K = 6, 16, 12, 80, 4
LONG, HEARTBEAT = (
    18,
    10,
)  # steps of a run in which one of two processes is killed; seconds until the other hears of it


def begun(key):
    """What both runs begin with."""
    return mj.dictionaries.BatchTopK.init(d_model=D, n_features=F, k=K, key=key)


def batches():
    """Batches that every process has whole."""
    import jax

    return [jax.device_get(jax.random.normal(jax.random.key(i), (B, D))) + 1 for i in range(STEPS)]


def trained(mesh, folder=None, stop=STEPS):
    """A short run, also through tokens' silence and AuxK."""
    import jax

    key = jax.random.key(0)
    return mj.dictlearn.train(
        begun(key), batches()[:stop], steps=STEPS, learning_rate=1e-3, key=key, steps_per_call=3, dead_after=2 * B,
        mesh=mesh, checkpoints=folder, save_every=3,
    )  # fmt: skip


def worker(index, port, path):
    """One of two processes, whose run is broken off and gone on with; the first writes what was found."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    mesh, folder = mj.make_mesh(data=2, model=4), Path(path).with_name("run")
    with contextlib.suppress(ArgumentError):
        trained(mesh, folder, stop=5)  # batches end early, as if both had been killed
    if mj.fit.saved_steps(folder) != (3,):
        raise SystemExit(f"kept: {mj.fit.saved_steps(folder)}")
    found = trained(mesh, folder)
    W = found.dictionary.W_dec
    if W.is_fully_addressable or len(W.sharding.device_set) != 8:
        raise SystemExit("the decoder does not lie on the devices of both processes")
    whole = multihost_utils.process_allgather(found.dictionary, tiled=True)
    if index == "0":
        np.savez(path, W_enc=whole.W_enc, W_dec=whole.W_dec, b_dec=whole.b_dec, threshold=whole.threshold,
                 loss=np.asarray(found.history["loss"]))  # fmt: skip


def bereaved(index, port, path):
    """One of two processes that train together, of which one will be killed; at its end the first says a digest."""
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    import jax

    jax.distributed.initialize(f"localhost:{port}", 2, int(index), heartbeat_timeout_seconds=HEARTBEAT)
    key, mesh = jax.random.key(0), mj.make_mesh(data=2, model=4)

    def slowly():
        for step in range(LONG):
            time.sleep(0.2)
            yield jax.device_get(jax.random.normal(jax.random.key(step), (B, D))) + 1

    found = mj.dictlearn.train(
        begun(key), slowly(), steps=LONG, learning_rate=1e-3, key=key, steps_per_call=3, mesh=mesh, checkpoints=path,
        save_every=3,
    )  # fmt: skip
    from jax.experimental import multihost_utils

    whole = multihost_utils.process_allgather((found.dictionary, found.history), tiled=True)
    if index == "0":
        sys.stdout.write(
            f"{hashlib.sha256(b''.join(x.tobytes() for x in jax.tree.leaves(whole))).hexdigest()}\n"
        )


def stream():
    """A stream with a buffer, of which a checkpoint holds what it has come to."""
    import jax

    rows = (jax.random.normal(jax.random.key(100 + i), (50, D)) + 1 for i in range(60))
    return mj.dictlearn.shuffled(rows, B, 8 * B, jax.random.key(7))


def begin(folder, path, steps, given):
    """A run that is kept at every other step; what was kept of it before is gone on with."""
    import jax

    key = jax.random.key(0)
    return mj.dictlearn.train(
        begun(key), given, steps=int(steps), learning_rate=1e-3, key=key, steps_per_call=2, save_every=2,
        checkpoints=folder, resample_at=(7,), dead_after=3 * B, metrics=path,
    )  # fmt: skip


def kept(folder, path, steps):
    """Such a run, which says when it begins and what it ends with."""
    sys.stdout.write("begins\n")
    sys.stdout.flush()
    sys.stdout.write(f"{digest(begin(folder, path, steps, stream()))}\n")


def full(folder):
    """Goes on with a run where no file can grow beyond 512 bytes, as on a full disk, and says how it ends."""
    import resource

    from mechjax.base.errors import WriteError

    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        kept(folder, None, 12)
    except WriteError as error:
        sys.stdout.write(f"{error}\n")


def ended(name, *given):
    """What a process of its own says."""
    return _process(name, *map(str, given)).communicate(timeout=240)


def digest(found):
    """One number of all that came of a run."""
    import jax
    import numpy as np

    whole = hashlib.sha256()
    for leaf in jax.tree.leaves((found.dictionary, found.history, found.silent)):
        whole.update(np.asarray(leaf).tobytes())
    return whole.hexdigest()


def killed(folder, path, kills, steps, rng):
    """The digest of a run that was killed so many times, and how many steps it had come to at each."""
    at = []
    while True:
        run = _process("kept", str(folder), str(path), str(steps))
        if run.stdout.readline() != "begins\n":
            raise AssertionError(run.communicate()[1][-2000:])
        if len(at) < kills:
            time.sleep(rng.uniform(0, 2.5))
            run.kill()
            run.communicate()
            at.append(max(mj.fit.saved_steps(folder), default=0))
            continue
        out, said = run.communicate(timeout=240)
        return out.strip(), at, said[-2000:]


def _pair(name, path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [_process(name, str(i), str(port), str(path)) for i in range(2)]


def after_a_death(folder):
    """How the first of two processes ends when the other is killed after its first checkpoint: in so many seconds."""
    runs = _pair("bereaved", folder)
    while not mj.fit.saved_steps(folder):
        if runs[0].poll() is not None:
            raise AssertionError(runs[0].communicate()[1][-3000:])
        time.sleep(0.1)
    runs[1].kill()
    runs[1].communicate()
    start = time.monotonic()
    said = runs[0].communicate(timeout=120)[1]
    return runs[0].returncode, time.monotonic() - start, said


def digest_of_two(folder):
    """What two processes that train to the end come to."""
    runs = _pair("bereaved", folder)
    (out, said), _ = (run.communicate(timeout=240) for run in runs)
    return out.split()[-1:], said[-3000:]


def two_processes(path):
    """What two processes found, and what they said."""
    runs = _pair("worker", path)
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
    plan = planned(10, 2, 1e-3, 0, 0.3, 0.0, None, 1000, None, True)
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
            advance((plan, jnp.ones(2), jnp.int32(0), (x, None)), eqx.combine(arrays, static))
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
    run = _process("tpu", **for_tpu())
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
    {"worker": worker, "bereaved": bereaved, "tpu": tpu, "kept": kept, "full": full}[sys.argv[1]](
        *sys.argv[2:]
    )
