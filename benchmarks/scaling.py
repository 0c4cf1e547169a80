"""How time and memory grow, beside what the plan says: `python -m benchmarks.scaling` writes `scaling.md`.

For each of several sizes (layers, width, batch, positions, edits of a sweep) a small decoder runs at four values of it.
Exponents are slopes of the logarithms: those of the measured time and of the operations that `mj.plan` counts, those
of the measured memory and of the plan's estimate. Then loading: a checkpoint onto one device and onto eight simulated
ones, beside `safetensors.numpy.load_file` and `device_put` of the same bytes, interleaved. Then arithmetic for models
that are not here. Takes some 5 minutes on 2 quiet cores; rows go to `results/scaling.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

import mechjax as mj
from benchmarks.__main__ import cpu_name
from benchmarks.worker import peak_of
from mechjax.base.units import in_bytes, in_flop
from mechjax.models import Config
from mechjax.parallel.hardware import PEAK, hardware

HERE = Path(__file__).parent
ROWS, PAGE = HERE / "results" / "scaling.json", HERE / "scaling.md"
BASE = Config(d_vocab=1000, n_ctx=1024, d_model=256, n_layers=4, n_heads=8, d_mlp=1024)
BATCH, POS, RUNS = 8, 64, 5
SIZES = {
    "layers": (4, 8, 16, 32),
    "width": (128, 256, 512, 1024),
    "batch": (8, 16, 32, 64),
    "positions": (64, 128, 256, 512),
    "edits": (8, 16, 32, 64),
}
MFU = 0.4  # the part of a device's peak that is assumed in the arithmetic
LLAMA = {
    "norm": "rms", "positions": "rotary", "mlp": "gated", "activation": "silu", "qkv_bias": False, "out_bias": False,
    "mlp_bias": False, "tied": False, "d_vocab": 128256, "n_ctx": 8192, "n_kv_heads": 8, "d_head": 128,
}  # fmt: skip
MODELS = {
    "8B": Config(d_model=4096, n_layers=32, n_heads=32, d_mlp=14336, **LLAMA),
    "70B": Config(d_model=8192, n_layers=80, n_heads=64, d_mlp=28672, **LLAMA),
    "405B": Config(d_model=16384, n_layers=126, n_heads=128, d_mlp=53248, **LLAMA),
}
NAMED = (
    ("8B", "v5e-8", {"data": 1, "model": 8}), ("8B", "1xH100", {"data": 1, "model": 1}),
    ("70B", "v5e-256", {"fsdp": 4, "model": 64}), ("70B", "v6e-16", {"data": 2, "model": 8}),
    ("70B", "8xH200", {"data": 1, "model": 8}), ("405B", "v5p-64", {"fsdp": 4, "model": 16}),
    ("405B", "16xH200", {"fsdp": 2, "model": 8}), ("405B", "v5e-256", {"fsdp": 4, "model": 64}),
)  # fmt: skip


def case(axis: str, n: int) -> tuple[Config, int, int]:
    """Config, batch and positions where one of the sizes is `n`."""
    changes = {
        "layers": {"n_layers": n},
        "width": {"d_model": n, "d_mlp": 4 * n, "n_heads": n // 32, "n_kv_heads": n // 32},
    }.get(axis, {})
    config = replace(BASE, d_head=32, **changes)
    return config, n if axis == "batch" else BATCH, n if axis == "positions" else POS


def swept(model: Any, ids: Any, edits: int) -> Any:
    """A sweep of so many cells of each layer."""
    places = {f"p{i}": np.full(len(ids), i, np.int32) for i in range(edits)}
    metric = mj.metrics.logit_diff(1, 2)
    return mj.patching.activation_patch(
        model, ids, ids[::-1], metric, site="z", over=("layer", "pos"), positions=places
    )


def measured(axis: str, n: int) -> dict[str, Any]:
    """One row: what the plan says and what is measured."""
    config, batch, pos = case(axis, n)
    model = mj.init(config, key=jax.random.key(0))
    ids = np.random.default_rng(0).integers(config.d_vocab, size=(batch, pos)).astype(np.int32)
    call: Callable[[Any], Any] = (lambda m: swept(m, ids, n)) if axis == "edits" else (lambda m: m(ids))
    said = mj.dry_run(call, model)
    work = lambda: jax.block_until_ready(call(model))
    work()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return {
        "axis": axis, "n": n, "flops": said.cost.flops, "estimated_bytes": said.cost.peak_bytes,
        "seconds": min(times), "bytes": max(peak_of(work) for _ in range(3)),
    }  # fmt: skip


def exponent(rows: list[dict[str, Any]], key: str) -> float:
    """The slope of log(key) over log(n)."""
    return float(np.polyfit(np.log([r["n"] for r in rows]), np.log([max(r[key], 1e-9) for r in rows]), 1)[0])


def loaded(folder: str, runs: int = 9) -> dict[str, Any]:
    """Medians of a load and of reading and placing the same bytes, in turn, on the devices of this process."""
    n = len(jax.devices())
    mesh = mj.make_mesh(data=1, model=n) if n > 1 else None
    files = sorted(Path(folder).glob("*.safetensors"))

    def by_hand() -> Any:
        arrays = {name: x for file in files for name, x in load_file(file).items()}
        if mesh is None:
            return jax.device_put(arrays)
        where = {2: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("model"))}
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return {name: jax.device_put(x, where.get(x.ndim, whole)) for name, x in arrays.items()}

    sides = {"mechjax": lambda: jax.tree.leaves(mj.load(folder, mesh=mesh)[0]), "by hand": by_hand}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            kept = jax.block_until_ready(side())
            times[name].append(time.perf_counter() - start)
            size = sum(x.nbytes for x in jax.tree.leaves(kept))
            del kept
    found = {name: median(some[1:]) for name, some in times.items()}
    return {"devices": n, "bytes": size, **found, "ratio": found["mechjax"] / found["by hand"]}


def loads() -> list[dict[str, Any]]:
    """Loads on one device and on eight, each in a process of its own, of a Llama of a gigabyte."""
    own = LLAMA | {"d_head": 64, "d_vocab": 32000, "tied": True}
    config = Config(d_model=1024, n_layers=12, n_heads=16, d_mlp=4096, **own)
    with tempfile.TemporaryDirectory() as folder:
        mj.export(mj.init(config, key=jax.random.key(0)), f"{folder}/model", family="llama")
        found = []
        for n in (1, 8):
            flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n}"
            done = subprocess.run(
                [sys.executable, "-m", "benchmarks.scaling", "--load", f"{folder}/model"], check=True,
                env=os.environ | {"XLA_FLAGS": flags}, stdout=subprocess.PIPE, text=True, cwd=HERE.parent,
            )  # fmt: skip
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def arithmetic() -> list[dict[str, Any]]:
    """What the plan says of models that are not here, on devices that are not here."""
    rows = []
    for name, devices, mesh in NAMED:
        config, batch = MODELS[name], 8
        forward = mj.plan(
            config, (batch, 1024), capture="resid_post", dtype="bfloat16", devices=devices, mesh=mesh
        )
        ids = np.ones((mesh.get("fsdp", 1) * mesh.get("data", 1), 64), np.int32)
        sweep = mj.dry_run(
            mj.patching.activation_patch, config, ids, ids[:, ::-1], mj.metrics.logit_diff(1, 2), site="resid_pre",
            dtype="bfloat16", devices=devices, mesh=mesh,
        )  # fmt: skip
        found = hardware(devices)
        rate = MFU * PEAK[found.kind] * found.n
        rows.append(
            {
                "model": name, "devices": devices, "mesh": mesh, "params": forward.share.params,
                "between": forward.share.between, "fits": forward.share.fits, "largest": forward.share.largest,
                "forward_flops": forward.flops, "forward_s": forward.flops / rate, "pairs": len(ids),
                "sweep_flops": sweep.cost.flops, "sweep_s": sweep.cost.flops / rate, "sweep_fits": sweep.share.fits,
            }
        )  # fmt: skip
    return rows


GROWTH = """# How time and memory grow

Made by `python -m benchmarks.scaling` on {machine}, jax {jax}. A decoder of {layers} layers, width {width}, {batch}
prompts x {pos} tokens, float32, but for what grows; least of {runs} runs. Exponents are slopes of logarithms: time
beside the operations that the plan counts, memory (of anonymous pages, beyond the weights) beside its estimate.

| grows | values | time | operations | memory | estimate | first to last: time; memory |
|---|---|---|---|---|---|---|"""
LOADING = """
## Loading

A Llama checkpoint in float32, its file cached: `mj.load` beside `safetensors.numpy.load_file` and `device_put` of the
same bytes, which transposes nothing. Medians of 9 in turn.

| devices | bytes | mj.load | by hand | ratio (goal: at most 1.5) |
|---|---|---|---|---|"""
ARITHMETIC = """
## Arithmetic for models that are not here

From `mj.plan` and `mj.dry_run` alone, in bfloat16: a forward of 8 x 1,024 tokens that captures `resid_post`, and a
sweep of `resid_pre` over every layer and 64 positions. Seconds assume {mfu:.0%} of each device's peak; nothing here
was run on such hardware.

| model | devices | mesh | parameters per device | in between, about | fits | forward | sweep |
|---|---|---|---|---|---|---|---|"""


def page(found: dict[str, Any]) -> str:
    """The page."""
    size = {"layers": BASE.n_layers, "width": BASE.d_model, "batch": BATCH, "pos": POS, "runs": RUNS}
    lines = [GROWTH.format(machine=found["machine"], jax=found["jax"], **size)]
    for axis, values in SIZES.items():
        rows = [r for r in found["rows"] if r["axis"] == axis]
        keys = ("seconds", "flops", "bytes", "estimated_bytes")
        slopes = " | ".join(f"{exponent(rows, key):.2f}" for key in keys)
        first, last = rows[0], rows[-1]
        ends = f"{1e3 * first['seconds']:.1f} to {1e3 * last['seconds']:.0f} ms; "
        ends += f"{in_bytes(first['bytes'])} to {in_bytes(last['bytes'])}"
        lines.append(f"| {axis} | {', '.join(map(str, values))} | {slopes} | {ends} |")
    lines.append(LOADING)
    lines += [
        f"| {r['devices']} | {in_bytes(r['bytes'])} | {r['mechjax']:.2f} s | {r['by hand']:.2f} s | {r['ratio']:.2f} |"
        for r in found["loads"]
    ]
    lines.append(ARITHMETIC.format(mfu=MFU))
    for r in found["arithmetic"]:
        mesh = " x ".join(f"{axis}={n}" for axis, n in r["mesh"].items())
        fits = "yes" if r["fits"] else f"no, batch {r['largest']} would" if r["largest"] else "no"
        cells = [r["model"], r["devices"], mesh, in_bytes(r["params"]), in_bytes(r["between"]), fits]
        cells.append(f"{in_flop(r['forward_flops'])}, {r['forward_s']:.2g} s")
        cells.append(f"{in_flop(r['sweep_flops'])} for {r['pairs']} pairs, {r['sweep_s']:.2g} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, or only write the page again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--load", help="a checkpoint: only time its loads, here")
    parser.add_argument(
        "--page", action="store_true", help="only write the page again, from the rows that are there"
    )
    args = parser.parse_args()
    if args.load:
        print(json.dumps(loaded(args.load)))
        return
    if not args.page:
        rows = [measured(axis, n) for axis, values in SIZES.items() for n in values]
        found = {
            "machine": f"{cpu_name()}, {os.cpu_count()} cores", "jax": jax.__version__, "rows": rows,
            "loads": loads(), "arithmetic": arithmetic(),
        }  # fmt: skip
        ROWS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(json.loads(ROWS.read_text())))


if __name__ == "__main__":
    main()
