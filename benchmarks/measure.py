"""Run one case: equal numbers first, sides interleaved, new tokens at every repeat; one JSON-ready line."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case, Side
from benchmarks.process import Worker


class NumbersDiffer(RuntimeError):
    """Two sides did not compute the same thing: no time is reported for them."""


def turns(runs: int, repeats: int) -> list[int]:
    """The repeats, of all, at which a side with fewer runs takes part: the first, and the others evenly spread."""
    return [i * repeats // runs for i in range(runs)]


def measure(
    case: Case, workers: dict[str, Worker], *, batch: tuple[int, int], d_vocab: int, folder: Path
) -> dict[str, Any]:
    """Time every side of a case.

    Raises:
        NumbersDiffer: naming the array, the difference and the tolerance.
    """
    repeats = max(side.runs for side in case.sides)
    replies: dict[str, list[dict[str, Any]]] = {side.name: [] for side in case.sides}
    differences: dict[str, float] = {}
    for repeat in range(repeats):
        arrays = draw_tokens(case.arrays, batch, d_vocab, seed=repeat, folder=folder)
        results: dict[str, dict[str, np.ndarray]] = {}
        order = case.sides if repeat % 2 == 0 else case.sides[::-1]
        for side in order:
            if repeat in turns(side.runs, repeats):
                reply = workers[side.worker].run(side.job, arrays, side.params)
                results[side.name] = {name: np.load(path) for name, path in reply["arrays"].items()}
                for path in reply["arrays"].values():
                    Path(path).unlink()
                replies[side.name].append(reply)
        if case.tolerance is not None:
            compare(case, results, differences)
    return {
        "case": case.name,
        "what": case.what,
        "sides": {side.name: summary(side, replies[side.name], workers[side.worker]) for side in case.sides},
        "largest_difference": differences,
        "tolerance": case.tolerance,
        **verdict(case, replies),
    }


def draw_tokens(
    names: tuple[str, ...], batch: tuple[int, int], d_vocab: int, *, seed: int, folder: Path
) -> dict[str, str]:
    """Random token arrays of a fixed seed, as paths of .npy files."""
    rng, paths = np.random.default_rng(seed), {}
    for name in names:
        paths[name] = str(folder / f"{name}.npy")
        np.save(paths[name], rng.integers(d_vocab, size=batch))
    return paths


def compare(case: Case, results: dict[str, dict[str, np.ndarray]], differences: dict[str, float]) -> None:
    """Refuse results that differ by more than the tolerance, or vary too little for that to mean anything."""
    (ours_name, ours), *others = ((s.name, results[s.name]) for s in case.sides if s.name in results)
    for name, theirs in others:
        if ours.keys() != theirs.keys():
            raise NumbersDiffer(f"{case.name}: {ours_name} gave {sorted(ours)}, {name} gave {sorted(theirs)}")
        for array in ours:
            a, b = ours[array], theirs[array]
            where = f"{case.name}: `{array}` of {ours_name} and {name}"
            if a.shape != b.shape:
                raise NumbersDiffer(f"{where} have shapes {a.shape} and {b.shape}")
            difference = float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
            if not difference <= case.tolerance:
                raise NumbersDiffer(f"{where} differ by {difference:.2e}; allowed is {case.tolerance:.0e}")
            if np.std(b) < 100 * case.tolerance:
                raise NumbersDiffer(
                    f"{where} vary by {np.std(b):.1e} only: too little to compare at {case.tolerance:.0e}"
                )
            differences[name] = max(difference, differences.get(name, 0.0))


def warm(replies: list[dict[str, Any]]) -> list[float]:
    """Seconds of the runs after the first; of the first where it is the only one (jobs of a minute)."""
    return [reply["seconds"] for reply in replies[1:] or replies]


def summary(side: Side, replies: list[dict[str, Any]], worker: Worker) -> dict[str, Any]:
    """What one side took, cold and warm."""
    p10, median, p90 = np.percentile(warm(replies), [10, 50, 90])
    peaks = [reply["peak_mb"] for reply in replies if reply["peak_mb"] is not None]
    return {
        "worker": side.worker,
        "params": side.params,
        "versions": worker.versions,
        "start_s": round(worker.start_s, 3),
        "first_s": round(replies[0]["seconds"], 4),
        "warm_runs": len(replies) - 1,
        "median_s": round(float(median), 4),
        "p10_s": round(float(p10), 4),
        "p90_s": round(float(p90), 4),
        "peak_mb": round(max(peaks)) if peaks else None,
        "facts": replies[-1]["facts"],
    }


def verdict(case: Case, replies: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Ratios of warm medians, others / ours, and which goals were missed."""
    ours, *others = case.sides
    base = float(np.median(warm(replies[ours.name])))
    ratios = {side.name: round(float(np.median(warm(replies[side.name]))) / base, 3) for side in others}
    facts = replies[ours.name][-1]["facts"]
    missed = [
        f"{name} {ratio} < {case.at_least[name]:.3g}"
        for name, ratio in ratios.items()
        if ratio < case.at_least.get(name, 0)
    ]
    missed += [
        f"{name} {ratio} > {case.at_most[name]:.3g}"
        for name, ratio in ratios.items()
        if ratio > case.at_most.get(name, np.inf)
    ]
    missed += [f"{name} {facts[name]} > {goal}" for name, goal in case.facts.items() if facts[name] > goal]
    goals = {name: f"at least {goal:.3g}" for name, goal in case.at_least.items()}
    goals |= {name: f"at most {goal:.3g}" for name, goal in case.at_most.items()}
    goals |= {name: f"at most {goal:.3g}" for name, goal in case.facts.items()}
    return {"ratios": ratios, "goals": goals, "missed": missed}
