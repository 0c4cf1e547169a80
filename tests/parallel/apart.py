"""Two processes that share a mesh of eight devices: `python -m tests.parallel.apart ID PORT FOLDER NAME...`.

Each runs all rows, so that what it takes to begin is paid once; the first keeps what was found.
"""

import json
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import mechjax as mj

SECONDS = 1500


def worker(index, port, folder, *names):
    """One of them."""
    os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4")
    import tests.conftest  # flags, strict dtypes, the cache  # noqa: F401  # isort: skip
    import jax
    import numpy as np

    jax.distributed.initialize(f"localhost:{port}", 2, int(index))
    from tests.parallel.placements import assert_split, automatic
    from tests.parallel.rows import found

    folder, said = Path(folder), {}
    case = automatic(folder)
    assert_split(case)
    for i, name in enumerate(names):
        began = time.perf_counter()
        try:
            given = found(name, case)
        except Exception:  # the other process fails in the same place, and both go on
            said[name] = traceback.format_exc()[-3000:]
        else:
            np.savez(folder / f"{i}.{index}.npz", *given)
        sys.stderr.write(f"{name}: {time.perf_counter() - began:.1f} s\n")
        sys.stderr.flush()
    (folder / f"said.{index}.json").write_text(json.dumps(said))


def together(folder, names):
    """For each row what the two processes found, or what they said of it.

    Raises:
        AssertionError: One of them ended before its end.
    """
    import numpy as np

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = [_process(str(i), str(port), str(folder), *names) for i in range(2)]
    try:
        ended = [(run.communicate(timeout=SECONDS)[1], run.returncode) for run in runs]
    finally:
        for run in runs:
            run.kill()
    if any(code for _, code in ended):
        raise AssertionError("\n".join(text[-3000:] for text, _ in ended))
    said = [json.loads((folder / f"said.{i}.json").read_text()) for i in range(2)]

    def of(i, name):
        if wrong := [text[name] for text in said if name in text]:
            return "\n".join(wrong)
        return [list(np.load(folder / f"{i}.{process}.npz").values()) for process in range(2)]

    return {name: of(i, name) for i, name in enumerate(names)}


def _process(*names):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.parallel.apart", *names],
        env=os.environ | {"PYTHONPATH": str(Path(mj.__file__).parents[1])},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


if __name__ == "__main__":
    worker(*sys.argv[1:])
