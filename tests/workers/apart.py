"""Workers in processes of their own: `python -m tests.workers.apart HOW FOLDER`, with `HOW` as JSON.

What a worker does and how it ends is one line of JSON. `mechjax.workers` needs no JAX, so the package's own imports are
left out, and a worker starts in a fifth of a second.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    package = types.ModuleType("mechjax")
    package.__path__ = [str(ROOT / "mechjax")]
    sys.modules["mechjax"] = package

from mechjax.base.errors import MechjaxError  # noqa: E402
from mechjax.workers import Sharing, opened, work  # noqa: E402


def result(index):
    """What unit `index` is: a few hundred bytes, more of them for later units."""
    return hashlib.sha256(str(index).encode()).digest() * (4 + index % 64)


def names(n):
    return [f"unit-{i:06d}" for i in range(n)]


def main(how, folder):
    """One worker; `how` says how many units, how they are shared, and what is odd about this worker or its units."""
    folder, own = Path(folder), {}

    def do(index):
        with (folder.parent / f"log-{os.getpid()}").open("a") as log:
            log.write(f"{index}\n")
        time.sleep(how.get("seconds", 0))
        if index == how.get("kills"):
            os.kill(os.getpid(), signal.SIGKILL)
        if index == how.get("raises"):
            raise ValueError("poison")
        return result(index) + how.get("other", "").encode()

    if "largest" in how:  # no file can grow beyond that, as on a full disk
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (how["largest"], how["largest"]))
    if "skew" in how:  # of the wall clock
        real = time.time
        time.time = lambda: real() + how["skew"]
    for name in ("worker", "of", "expiry", "owner", "process"):
        if name in how:
            own[name] = how[name]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            found = work(opened(folder), names(how["n"]), do, sharing=Sharing(**own))
            page = {"done": found.done, "again": found.again, "quarantined": found.quarantined}
        except MechjaxError as error:
            page = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(page | {"said": [str(w.message) for w in said]}) + "\n")


def begun(folder, **how):
    """A worker that has been started."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.workers.apart", json.dumps(how), str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process, timeout=60):
    """What a worker says at its end; None of one that was killed."""
    out, _ = process.communicate(timeout=timeout)
    return json.loads(out) if out else None


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2])
