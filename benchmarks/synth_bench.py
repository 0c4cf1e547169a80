"""SynthSAEBench's world at 1/16: dictionaries of mechjax and of SAELens, trained on the same stream.

`python -m benchmarks.synth_bench ENVIRONMENTS` (as made by `benchmarks.peers`) takes some 20 minutes on 2 cores. Both
sides train at once, each from starts of its own; every batch that mechjax draws is also written to SAELens' stdin.
What SAELens writes is read by `mechjax.dictionaries.load` and judged by the same samples; what SAELens' own evaluation
says of its dictionaries must agree with that. Rows go to `results/synth_bench.json`, the page to `synth_bench.md`.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import mechjax as mj
from benchmarks import synth_recipes as recipes
from benchmarks.peers.__main__ import interpreter
from mechjax.studies.synth_bench import SynthBench, judged, stream
from mechjax.tasks.synthetic_world import World, synth_sae_bench

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "synth_bench.json", HERE / "synth_bench.md"
WORLD, STREAM, HELD_OUT = 0, 1, 2  # seeds
SAMPLES, OWN_SAMPLES = 65_536, 16_384  # to judge by; of these, SAELens' own evaluation sees the first
UNIT_ROWS = """SAELens lets its decoder's rows grow, mechjax keeps them at length 1, and JumpReLU's penalty counts
latents above thresholds that have a length of their own. With rows brought to length 1 after each of SAELens' steps
(`--unit-rows`), means of SAELens over three seeds are as follows (mechjax in brackets):
"""
SCORES = ("f1", "mcc", "unique", "explained", "l0")
AGREED = 2e-3  # between two evaluations of one dictionary: an activation at its threshold may fall either way


def ours(kind: str, seed: int, d_model: int) -> Any:
    """Where training of a kind begins."""
    d = mj.dictionaries
    kinds = {
        "top_k": d.TopK,
        "batch_top_k": d.BatchTopK,
        "matryoshka": d.Matryoshka,
        "jump_relu": d.JumpReLU,
        "relu": d.ReLU,
    }
    return kinds[kind].init(
        d_model=d_model, n_features=recipes.N_FEATURES, key=jax.random.key(seed), **recipes.RECIPES[kind]
    )


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environments", type=Path)
    parser.add_argument("--steps", type=int, default=recipes.STEPS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stream", type=int, default=STREAM, help="seed of the stream")
    parser.add_argument(
        "--unit-rows", action="store_true", help="keep SAELens' decoder rows at length 1; implies --dry"
    )
    parser.add_argument("--dry", action="store_true", help="write nothing")
    args = parser.parse_args()
    world = synth_sae_bench(jax.random.key(WORLD), scale=1 / 16)
    with tempfile.TemporaryDirectory() as folder:
        found = compared(world, Path(folder), args)
    print(page(found))
    if not (args.dry or args.unit_rows):
        found["unit_rows"] = json.loads(ROWS.read_text())["unit_rows"]
        rows = ",\n".join(json.dumps(row) for row in found["rows"])
        head = json.dumps({name: value for name, value in found.items() if name != "rows"})
        ROWS.write_text(f'{head[:-1]}, "rows": [\n{rows}\n]}}\n')
        PAGE.write_text(page(found))


def compared(world: World, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Both sides' scores, row by row."""
    names = [f"{kind}-{seed}" for kind in recipes.RECIPES for seed in range(args.seeds)]
    d_model, held_out = world.features.shape[1], jax.random.key(HELD_OUT)
    x, activations = first_of(world, held_out)
    np.savez(folder / "held_out.npz", features=world.features, x=x, activations=activations)
    settings = {"steps": args.steps, "seeds": args.seeds, "d_model": d_model, "unit_rows": args.unit_rows}
    (folder / "settings.json").write_text(json.dumps(settings))
    peer = subprocess.Popen(
        [interpreter(args.environments, "saelens"), "-m", "benchmarks.peers.saelens_synth_bench", folder],
        stdin=subprocess.PIPE, cwd=HERE.parent, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    batches = stream(world, jax.random.key(args.stream), batch=recipes.BATCH, steps=args.steps)
    runs = mj.dictlearn.train_many(
        [ours(*name.rsplit("-", 1)[:1], int(name.rsplit("-", 1)[1]), d_model) for name in names],
        told(batches, peer), steps=args.steps, learning_rate=recipes.LEARNING_RATE,
        sparsity_warm_up=recipes.WARM_UP, dead_after=recipes.DEAD_AFTER * recipes.BATCH, normalize=False, centre=False,
    )  # fmt: skip
    if peer.stdin:
        peer.stdin.close()
    if peer.wait():
        raise SystemExit("SAELens' side failed.")
    own = json.loads((folder / "scores.json").read_text())
    theirs = {name: mj.dictionaries.load(folder / name) for name in names}
    sides = {
        "mechjax": {name: run.dictionary for name, run in zip(names, runs, strict=True)},
        "saelens": theirs,
    }
    agree(judged(world, theirs, key=held_out, samples=OWN_SAMPLES), own["scores"])
    rows = []
    for side, dictionaries in sides.items():
        scores = judged(world, dictionaries, key=held_out, samples=SAMPLES)
        for i, name in enumerate(names):
            kind, seed = name.rsplit("-", 1)
            columns = {c: round(float(getattr(scores, c)[i]), 5) for c in own["scores"][name]}
            rows.append({"kind": kind, "side": side, "seed": int(seed), **columns})
    versions = own["versions"] | {n: importlib.metadata.version(n) for n in ("jax", "jaxlib")}
    return {"steps": args.steps, "batch": recipes.BATCH, "versions": versions, "rows": rows}


def first_of(world: World, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The samples that `judged` draws first."""
    batches = [world.sample(jax.random.fold_in(key, n), 4096) for n in range(OWN_SAMPLES // 4096)]
    x, activations = zip(*batches, strict=True)
    return np.concatenate(x), np.concatenate(activations)


def told(batches: Iterable[Any], peer: subprocess.Popen) -> Iterator[Any]:
    """The stream, written to the other side as well."""
    for x in batches:
        if peer.stdin:
            peer.stdin.write(np.asarray(x, np.float32).tobytes())
        yield x


def agree(ours: SynthBench, theirs: dict[str, dict[str, float]]) -> None:
    """Whether both evaluations say the same of the same dictionaries."""
    for i, name in enumerate(ours.names):
        for column, value in theirs[name].items():
            found = float(getattr(ours, column)[i])
            assert abs(found - value) <= AGREED * max(1, abs(value)), (name, column, found, value)


def page(found: dict[str, Any]) -> str:
    """The page: for each kind and score both sides' mean and spread over seeds, and how far apart they are."""
    rows, seeds = found["rows"], len({row["seed"] for row in found["rows"]})
    lines = [
        "# SynthSAEBench's world at 1/16: mechjax and SAELens on the same stream",
        "",
        f"Made by `python -m benchmarks.synth_bench`. 1,024 features in 192 dimensions, {recipes.N_FEATURES} latents, "
        f"{found['steps']:,} steps of {found['batch']:,} samples, {seeds} seeds of the start on each side; "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        + ".",
        "",
        "Mean over seeds ± standard deviation of one run. `apart` is the difference of the means over the spread of "
        "one run (that of both sides, 0.002 at least): within 2, a run of one library passes for one of the other. All "
        "dictionaries are judged by the same samples, SAELens' as `mechjax.dictionaries.load` reads what SAELens "
        "wrote; SAELens' own evaluation of these agrees. Matching pursuit is left out: SAELens' ends by other rules "
        "(the length of what is left over, a latent that is found twice).",
        "",
        "| kind | score | mechjax | SAELens | apart |",
        "|---|---|---|---|---|",
    ]
    far = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for score in SCORES:
            a, b = (
                np.array([row[score] for row in rows if row["kind"] == kind and row["side"] == side])
                for side in ("mechjax", "saelens")
            )
            told = [f"{z.mean():.4f} ± {spread(z):.4f}" for z in (a, b)]
            lines.append(f"| {kind} | {score} | {told[0]} | {told[1]} | {apart(a, b):+.1f} |")
            far += [f"{score} of {kind}"] if abs(apart(a, b)) > 2 else []
    lines += ["", f"Further apart than 2: {', '.join(far) or 'none'}.", "", UNIT_ROWS]
    for kind, scores in found["unit_rows"].items():
        own = [row for row in rows if row["kind"] == kind and row["side"] == "mechjax"]
        said = (
            f"{score} {np.mean(values):.3f} ({np.mean([row[score] for row in own]):.3f})"
            for score, values in scores.items()
        )
        lines.append(f"- {kind}: {', '.join(said)}")
    return "\n".join([*lines, ""])


def spread(values: np.ndarray) -> float:
    """Standard deviation of one run."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def apart(a: np.ndarray, b: np.ndarray) -> float:
    """The difference of the means over the spread of a run."""
    pooled = float(np.sqrt((spread(a) ** 2 + spread(b) ** 2) / 2))
    return float((a.mean() - b.mean()) / max(pooled, 0.002))


if __name__ == "__main__":
    main()
