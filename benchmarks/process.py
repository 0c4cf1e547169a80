"""The side that asks: starts a worker in its own interpreter, talks JSON lines with it, and ends it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers.__main__ import interpreter

ROOT = Path(__file__).parent.parent


class WorkerFailed(RuntimeError):
    """A worker died or answered with a traceback; the message holds it."""


class Worker:
    """One long-lived process with one library and the checkpoint in it.

    Attributes:
        start_s: Seconds from starting the process until the checkpoint was loaded.
        versions: What the worker says of the libraries that it runs.
    """

    def __init__(
        self, name: str, *, environments: Path, checkpoint: Path, folder: Path, device: str, threads: int
    ):
        self.name = name
        self.log = folder / f"{name}.log"
        python = Path(sys.executable) if name == "mechjax" else interpreter(environments, name)
        if not python.exists():
            raise WorkerFailed(
                f"no environment {python}; make it with `python -m benchmarks.peers {environments}`"
            )
        module = "benchmarks.ours" if name == "mechjax" else f"benchmarks.peers.{name}"
        settings = {
            "checkpoint": str(checkpoint),
            "folder": str(folder),
            "device": device,
            "threads": threads,
        }
        start = time.perf_counter()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.worker", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                cwd=ROOT,
                env=environment(device, threads),
            )
        try:
            self.versions: dict[str, str] = self._ask(settings)["versions"]
        except WorkerFailed:
            self.close()
            raise
        self.start_s = time.perf_counter() - start

    def run(self, job: str, arrays: dict[str, str], params: dict[str, Any]) -> dict[str, Any]:
        """Let the worker run one job once."""
        return self._ask({"job": job, "arrays": arrays, "params": params})

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise WorkerFailed(f"{self.name} has no pipes")
        try:
            stdin.write(json.dumps(message) + "\n")
            line = stdout.readline()
        except BrokenPipeError:
            line = ""
        reply = json.loads(line) if line else {"error": f"the process ended:\n{self.log.read_text()[-2000:]}"}
        if "error" in reply:
            raise WorkerFailed(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process: it stops at the end of its input."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def environment(device: str, threads: int) -> dict[str, str]:
    """The variables of a worker: no network, one number of threads everywhere, and no compilation kept on disk."""
    variables = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # cold means cold
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "",  # empty: the best that jax finds
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # the other side needs the GPU's memory too
    }
    return os.environ | variables


def pin(threads: int) -> None:
    """Keep this process and its workers on its first `threads` cores (where the system can)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
