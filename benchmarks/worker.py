"""The side that computes: a loop that answers JSON lines, the same for mechjax and for every peer.

`python -m benchmarks.worker MODULE` calls the module's `load(settings)`, which loads the checkpoint once and returns
the jobs by name and the versions that matter. A request `{"job", "arrays": {name: path.npy}, "params"}` is answered
with `{"seconds", "peak_mb", "arrays": {name: path.npy}, "facts"}`. Only numpy and the standard library are imported
here: this file runs in every environment.

A job takes its arrays and parameters and returns two functions: the work, which alone is timed, and what turns its
result into named arrays (written as .npy files) and plain numbers (`facts`).
"""

import ctypes
import functools
import gc
import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = Callable[..., tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]]
MEMORY = Path("/proc/self/status")


def main() -> None:
    """Load the module named in argv, then answer requests until stdin closes."""
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print: nothing but answers may go to the real stdout
    settings = json.loads(sys.stdin.readline())
    jobs: dict[str, Job] = {}

    def load() -> dict[str, Any]:
        loaded, versions = importlib.import_module(sys.argv[1]).load(settings)
        jobs.update(loaded)
        return {"versions": versions}

    def answer(action: Callable[[], dict[str, Any]]) -> None:
        try:
            reply = action()
        except Exception:
            reply = {"error": traceback.format_exc()}
        channel.write(json.dumps(reply) + "\n")

    answer(load)
    for line in sys.stdin:
        request = json.loads(line)
        answer(functools.partial(run, jobs[request["job"]], request, Path(settings["folder"])))


def run(job: Job, request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One timed run of one job."""
    inputs = {name: np.load(path) for name, path in request["arrays"].items()}
    work, collect = job(**inputs, **request["params"])
    gc.collect()
    forget_peak()
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    reply: dict[str, Any] = {"seconds": seconds, "peak_mb": peak_mb(), "arrays": {}, "facts": {}}
    for name, value in collect(result).items():
        if isinstance(value, np.ndarray):
            path = str(folder / f"{os.getpid()}-{name}.npy")
            np.save(path, value)
            reply["arrays"][name] = path
        else:
            reply["facts"][name] = value
    return reply


def steering(d_model: int) -> np.ndarray:
    """The vector that every edited generation adds in the middle of the model."""
    return 0.02 * np.cos(
        np.arange(d_model, dtype=np.float32)
    )  # as large as an embedding, so that tokens still differ


def peak_of(work: Callable[[], Any]) -> float:
    """Bytes of anonymous memory that `work` takes at its peak, beyond what is in use before; NaN except on Linux."""
    if sys.platform != "linux":
        return float("nan")

    def anonymous() -> int:
        lines = MEMORY.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    gc.collect()
    ctypes.CDLL(None).malloc_trim(
        0
    )  # what earlier work freed, and the allocator kept, would be had for nothing
    before, peaks, done = anonymous(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(peaks, default=before) - before


def forget_peak() -> None:
    """Start the process's memory high-water mark anew (Linux only; elsewhere the mark is of the whole life)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_mb() -> float | None:
    """Memory high-water mark since `forget_peak`, the loaded model included; None where the system does not say."""
    if not MEMORY.exists():
        return None
    kilobytes = next(line.split()[1] for line in MEMORY.read_text().splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) / 1024


if __name__ == "__main__":
    main()
