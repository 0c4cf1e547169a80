"""The benchmark harness refuses what it should. Nothing here is timed, and no peer is needed."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import dictionary_data, table
from benchmarks.cases import Case, Side
from benchmarks.measure import NumbersDiffer, measure, turns
from benchmarks.ours import train_job
from benchmarks.process import ROOT, Worker, WorkerFailed
from benchmarks.worker import peak_of
from tests.needs import LINUX


class Toy:
    """A worker that answers at once: `scale` times the mean token of each position, `seconds` late by its own clock."""

    def __init__(self, folder: Path, scale: float, seconds: float):
        self.folder, self.scale, self.seconds = folder, scale, seconds
        self.asked: list[bytes] = []
        self.versions, self.start_s = {"toy": "1"}, 1.0

    def run(self, job: str, arrays: dict[str, str], params: dict[str, Any]) -> dict[str, Any]:
        tokens = np.load(arrays["tokens"])
        self.asked.append(tokens.tobytes())
        np.save(self.folder / "toy.npy", (self.scale * tokens.mean(0)).astype(np.float32))
        arrays = {"scores": str(self.folder / "toy.npy")}
        return {"seconds": self.seconds, "peak_mb": 1.0, "arrays": arrays, "facts": {}}


def run(folder: Path, ours: Toy, theirs: Toy, runs: tuple[int, int] = (4, 2)) -> dict[str, Any]:
    sides = tuple(Side(name, "job", runs=n) for name, n in zip(("mechjax", "peer"), runs, strict=True))
    case = Case("toy", "a toy", sides, tolerance=1e-5, at_least={"peer": 2.5})
    return measure(case, {"mechjax": ours, "peer": theirs}, batch=(8, 16), d_vocab=100, folder=folder)  # pyright: ignore


def test_measure__equal_numbers__gives_ratios_of_fresh_shared_tokens(tmp_path):
    ours, theirs = Toy(tmp_path, 1.0, 0.5), Toy(tmp_path, 1.0, 1.0)
    line = run(tmp_path, ours, theirs)
    assert line["ratios"] == {"peer": 2.0}
    assert line["missed"] == ["peer 2.0 < 2.5"]
    assert len(set(ours.asked)) == 4
    assert theirs.asked == [ours.asked[0], ours.asked[2]]
    assert "at least 2.5" in table.rows(line)[1]


@pytest.mark.parametrize(("scale", "message"), [(1.001, "differ by"), (np.nan, "differ by nan")])
def test_measure__other_numbers__are_refused(tmp_path, scale, message):
    with pytest.raises(NumbersDiffer, match=message):
        run(tmp_path, Toy(tmp_path, 1.0, 1.0), Toy(tmp_path, scale, 1.0))


def test_measure__numbers_that_hardly_vary__are_refused(tmp_path):
    with pytest.raises(NumbersDiffer, match="too little to compare"):
        run(tmp_path, Toy(tmp_path, 1e-6, 1.0), Toy(tmp_path, 1e-6, 1.0))


def test_turns__fewer_runs__are_spread_from_the_first():
    assert [turns(n, 6) for n in (1, 2, 6)] == [[0], [0, 3], [0, 1, 2, 3, 4, 5]]


def test_worker__without_environment__says_how_to_make_it(tmp_path):
    with pytest.raises(WorkerFailed, match=r"python -m benchmarks.peers"):
        Worker(
            "nnsight", environments=tmp_path, checkpoint=tmp_path, folder=tmp_path, device="cpu", threads=1
        )


def test_worker__that_cannot_load__shows_its_traceback(tmp_path):
    with pytest.raises(WorkerFailed, match="mechjax: Traceback"):
        Worker(
            "mechjax", environments=tmp_path, checkpoint=tmp_path, folder=tmp_path, device="cpu", threads=1
        )
    assert (ROOT / "benchmarks").is_dir()


def test_worker__of_a_peer_without_its_authors_package__says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.process.interpreter", lambda *_: Path(sys.executable))
    missing = (
        r"eapig: the process ended:\nthe `eapig` side needs the authors' package `eap` .* --without eapig$"
    )
    with pytest.raises(WorkerFailed, match=missing):
        Worker("eapig", environments=tmp_path, checkpoint=tmp_path, folder=tmp_path, device="cpu", threads=1)


def test_measure__a_fact_above_its_goal__is_missed_and_shown_beside_ratios(tmp_path):
    class Heavy(Toy):
        def run(self, job, arrays, params):
            return super().run(job, arrays, params) | {"facts": {"peak_over_weights": 1.3, "other": 7}}

    case = Case("toy", "a toy", (Side("mechjax", "job"), Side("peer", "job")), tolerance=1e-5)
    case = replace(case, at_least={"peer": 1.0}, facts={"peak_over_weights": 1.2})
    workers = {"mechjax": Heavy(tmp_path, 1.0, 0.5), "peer": Toy(tmp_path, 1.0, 1.0)}
    line = measure(case, workers, batch=(8, 16), d_vocab=100, folder=tmp_path)
    assert line["missed"] == ["peak_over_weights 1.3 > 1.2"]
    ours, theirs = table.rows(line)
    assert "| peak over weights: 1.3; other: 7 | peak over weights: at most 1.2 |" in ours
    assert "| 2.00 | at least 1 |" in theirs


@pytest.mark.parametrize("kind", ["top_k", "batch_top_k", "jump_relu"])
def test_train_job__of_every_kind__runs_and_says_what_it_made(kind, monkeypatch):
    monkeypatch.setattr(dictionary_data, "TOKENS", 16)
    with jax.numpy_dtype_promotion("standard"):  # optax is not written for the strict one
        work, collect = train_job(kind, 8, 64, active=4, threshold=0.1, bandwidth=0.1)
        _, measures = work()
    assert np.isfinite(measures["loss"]).all()
    assert collect(None)["made"].shape == (16, 8)


@LINUX
def test_peak_of__work_that_frees_what_it_took__counts_it():
    kept = np.ones(25_000_000)
    assert 1.0 <= peak_of(lambda: (np.ones(25_000_000), time.sleep(0.05))) / kept.nbytes < 1.1
