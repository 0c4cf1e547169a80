"""Run the benchmarks: `python -m benchmarks ENVIRONMENTS`; `python -m benchmarks.peers ENVIRONMENTS` makes them."""

import argparse
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import checkpoint, table
from benchmarks.cases import Case, cases
from benchmarks.measure import NumbersDiffer, measure
from benchmarks.process import ROOT, Worker, WorkerFailed, pin

BATCH = (8, 16)
BUSY = 0.5  # load of the machine above which times are worth little


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("environments", type=Path, help="folder with the peers' virtual environments")
    parser.add_argument("--cases", nargs="+", choices=[case.name for case in cases(BATCH)], help="only these")
    parser.add_argument("--without", nargs="+", default=[], help="peers to leave out, such as nnsight")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads, and cores, of every side")
    parser.add_argument("--runs", type=int, help="at most so many runs of each side")
    parser.add_argument(
        "--quick", action="store_true", help="tiny model, 2 runs, nothing written: does it work?"
    )
    parser.add_argument("--out", type=Path, help="append here, not to benchmarks/results/DEVICE.jsonl")
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases asked for, without the peers left out."""
    picked = []
    for case in cases(BATCH):
        if options.cases and case.name not in options.cases:
            continue
        sides = [side for side in case.sides if side.worker not in options.without]
        most = options.runs or (2 if options.quick else max(side.runs for side in sides))
        picked.append(replace(case, sides=tuple(replace(side, runs=min(side.runs, most)) for side in sides)))
    return picked


def provenance(options: argparse.Namespace, shape: str) -> dict[str, Any]:
    """What a line needs so that it can be believed later."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()

    return {
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--", "mechjax", "benchmarks/*.py")),
        "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "cores": options.threads,
        "machine": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_at_start": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "model": shape,
        "batch": BATCH,
        "dtype": "float32",
    }


def cpu_name() -> str:
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def run(options: argparse.Namespace, out: Path | None) -> list[str]:
    """Run the cases, print their rows, append their lines to `out`, and say which goals were missed."""
    shape = "tiny" if options.quick else "gpt2-small"
    d_vocab = checkpoint.SHAPES[shape]["vocab_size"]
    about = provenance(options, shape)
    if about["load_at_start"] > BUSY:
        print(f"the machine is busy (load {about['load_at_start']}): times are worth little", file=sys.stderr)
    pin(options.threads)
    missed: list[str] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = checkpoint.write(folder / "checkpoint", shape)
        workers: dict[str, Worker] = {}
        for case in chosen(options):
            for name in {side.worker: None for side in case.sides if side.worker not in workers}:
                workers[name] = Worker(
                    name,
                    environments=options.environments.absolute(),
                    checkpoint=model,
                    folder=folder,
                    device=options.device,
                    threads=options.threads,
                )
                stack.callback(workers[name].close)
            line = measure(case, workers, batch=BATCH, d_vocab=d_vocab, folder=folder) | about
            print("\n".join(table.rows(line)), flush=True)
            missed += line["missed"]
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return missed


def main() -> None:
    options = arguments()
    kept = None if options.quick else ROOT / "benchmarks" / "results" / f"{options.device}.jsonl"
    try:
        missed = run(options, options.out or kept)
    except (NumbersDiffer, WorkerFailed) as error:
        raise SystemExit(str(error)) from None
    if kept and not options.out:
        table.write()
    if missed:
        raise SystemExit("goals missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
