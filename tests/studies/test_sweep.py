"""Sweeps by several workers: what they find together is what one program finds."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, SweepError
from mechjax.models import Config
from mechjax.models.export import export
from mechjax.patching.sweep import Sweep
from mechjax.studies import sweep
from mechjax.studies.sweep_spec import spec_of
from mechjax.tasks.vocabulary import build_tokenizer
from mechjax.workers import Sharing
from mechjax.workers.agree import digest_of
from tests.studies import sweep_apart
from tests.tolerances import TOL

ROOT = Path(__file__).parents[2]
UNITS = 3 * 2  # parts, layers


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = build_tokenizer()
    config = Config(d_vocab=tokenizer.vocab_size, n_ctx=64, d_model=16, n_layers=2, n_heads=2)
    folder = tmp_path_factory.mktemp("sweep") / "model"
    return str(export(mj.init(config, key=jax.random.key(0)), folder, family="gpt2", tokenizer=tokenizer))


@pytest.fixture(scope="module")
def page(model):
    return {"model": model, "task": "ioi", "n": 10, "site": "z", "over": ["layer", "head"], "batch": 4}


@pytest.fixture(scope="module")
def done(page, tmp_path_factory):
    """A folder that one worker has filled."""
    folder = str(tmp_path_factory.mktemp("done") / "sweep")
    return folder, sweep.run(spec_of(page), folder)


@pytest.fixture
def copied(done, tmp_path):
    return str(shutil.copytree(done[0], tmp_path / "copy"))


def same(one, two):
    for name in ("scores", "per_example", "clean", "corrupt"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), **TOL["float32", "sweep"])


def whole(model, page):
    """The same sweep by one call, of all pairs at once."""
    decoder, tokenizer = mj.load(model)
    pairs = mj.tasks.ioi(tokenizer, page["n"])
    metric = mj.metrics.logit_diff(pairs.correct, pairs.wrong)
    how = {key: page[key] for key in ("site", "over", "mode") if key in page}
    if "positions" in page:
        how["positions"] = {name: pairs.positions[name] for name in page["positions"]}
    return mj.patching.activation_patch(decoder, pairs.clean, pairs.corrupt, metric, **how)


def test_run__by_one_worker__finds_what_one_call_finds(done, model, page):
    folder, did = done
    assert len(did.done) == len(set(did.done)) == UNITS and not (did.again or did.quarantined)
    found = sweep.result(folder)
    same(found, whole(model, page))
    assert found.top(1)[0][0] == whole(model, page).top(1)[0][0] and (found.site, found.mode) == (
        "z",
        "denoise",
    )
    assert sweep.status(folder).done and sweep.verify(folder) == []
    assert sweep.run(spec_of(page), folder).done == ()


@pytest.mark.slow
def test_run__of_named_positions__has_their_names(model, page, tmp_path):
    page = {
        **page,
        "site": "resid_pre",
        "over": ["layer", "pos"],
        "positions": ["S2", "END"],
        "mode": "noise",
    }
    sweep.run(spec_of(page), tmp_path)
    same(sweep.result(tmp_path), whole(model, page))
    assert sweep.result(tmp_path).axis_labels() == {"pos": ("S2", "END")}


@pytest.mark.parametrize("metric", ["prob", pytest.param("nll", marks=pytest.mark.slow)])
def test_run__of_texts__reads_the_answer(model, tmp_path, metric):
    clean = ["When Mary and John went to the store, John gave a ring to"] * 2
    corrupt = ["When Mary and John went to the store, Mary gave a ring to"] * 2
    page = {"model": model, "clean": clean, "corrupt": corrupt, "answer": ["Mary", "John"], "metric": metric,
            "over": ["pos"], "positions": {"S2": [11, 11]}}  # fmt: skip
    sweep.run(spec_of(page), tmp_path)
    decoder, tokenizer = mj.load(model)
    of = getattr(mj.metrics, metric)(np.array([tokenizer.token(" Mary"), tokenizer.token(" John")], np.int32))
    same(
        sweep.result(tmp_path),
        mj.patching.activation_patch(
            decoder, tokenizer(clean), tokenizer(corrupt), of, site="resid_pre", over=("pos",),
            positions={"S2": jnp.array([11, 11])},
        ),
    )  # fmt: skip


def test_run__by_numbers__is_done_when_all_have_been_there(page, done, tmp_path):
    for worker in (1, 0):
        did = sweep.run(spec_of(page), tmp_path, sharing=Sharing(worker=worker, of=2))
        assert len(did.done) == UNITS // 2
        assert sweep.status(tmp_path).done == (worker == 0)
    same(sweep.result(tmp_path), sweep.result(done[0]))


def test_run__by_processes_that_are_killed__finds_the_same(page, done, tmp_path):
    spec, folder = tmp_path / "spec.json", tmp_path / "sweep"
    spec.write_text(json.dumps(page))
    there = lambda: len(list(folder.glob("part-*/unit-*.safetensors")))
    begin = lambda: subprocess.Popen(
        [sys.executable, "-c", "from mechjax.cli import main; raise SystemExit(main())", "sweep", "run", str(spec),
         str(folder)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    workers = [begin(), begin()]
    while all(worker.poll() is None for worker in workers) and not there():
        time.sleep(0.01)
    workers[0].send_signal(signal.SIGKILL)
    workers[0].communicate()
    for worker in (workers[1], begin()):
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err[-2000:]
        assert "How much of the difference comes back" in out
    assert sweep.verify(folder) == [] and there() == UNITS
    same(sweep.result(folder), sweep.result(done[0]))


@pytest.mark.slow
def test_run__by_a_worker_of_two_processes__finds_the_same(page, done, tmp_path):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({**page, "mesh": [2, 2]}))
    said = [process.communicate(timeout=120) for process in sweep_apart.begun(spec, tmp_path / "sweep")]
    shape = str(sweep.result(done[0]).per_example.shape)
    assert [out.splitlines()[-1] for out, _ in said] == [f"{UNITS} {shape}", f"0 {shape}"], said
    assert sweep.verify(tmp_path / "sweep") == []
    for name in ("per_example", "clean", "corrupt"):
        found = getattr(sweep.result(tmp_path / "sweep"), name)
        np.testing.assert_allclose(found, getattr(sweep.result(done[0]), name), **TOL["float32", "mesh"])


def test_run__of_another_specification_or_model__names_what_differs(page, copied, model, tmp_path):
    with pytest.raises(
        ArgumentError, match='`site` is "z" there and "q" here; `batch` is 4 there and 5 here'
    ):
        sweep.run(spec_of({**page, "site": "q", "batch": 5}), copied)
    decoder, tokenizer = mj.load(model)
    shutil.rmtree(f"{copied}/part-000001")
    config = dataclasses.replace(decoder.config)
    other = export(mj.init(config, key=jax.random.key(5)), tmp_path / "m", family="gpt2", tokenizer=tokenizer)
    top = json.loads((Path(copied) / "sweep.json").read_text())
    assert top.pop("sha256")
    (Path(copied) / "sweep.json").unlink()
    sweep.agree(sweep.opened(copied), {**top, "model": str(other)}, units="none")
    shutil.rmtree(f"{copied}/part-000002/.leases")
    os.unlink(f"{copied}/part-000002/unit-000000.safetensors")
    with pytest.raises(ArgumentError, match=r"`.*part-000002` holds another sweep: `model` is "):
        sweep.run(spec_of({**page, "model": str(other)}), copied)


def test_run__where_a_unit_fails__does_the_rest_and_tries_again(page, done, tmp_path, monkeypatch):
    real = Sweep.scores_of

    def poisoned(plan, runs, layer, cells, start):
        if int(layer) == 1 and plan.base.shape[0] == 2:  # of the last part
            raise ValueError("poison")
        return real(plan, runs, layer, cells, start)

    monkeypatch.setattr(Sweep, "scores_of", poisoned)
    assert len(sweep.run(spec_of(page), tmp_path).done) == UNITS - 1
    assert sweep.status(tmp_path).failed == (("part-000002/unit-000001.safetensors", "ValueError: poison"),)
    with pytest.raises(
        SweepError, match=r"1 of 2 units in .*part-000002` failed three times.*ValueError: poison"
    ):
        sweep.result(tmp_path)
    monkeypatch.setattr(Sweep, "scores_of", real)
    assert sweep.run(spec_of(page), tmp_path).done == ()
    assert sweep.run(spec_of(page), tmp_path, retry=True).done == ("part-000002/unit-000001.safetensors",)
    same(sweep.result(tmp_path), sweep.result(done[0]))


def test_verify__of_files_that_are_not_what_they_were__names_each(copied):
    part = Path(copied) / "part-000001"
    unit = part / "unit-000000.safetensors"
    data = bytearray(unit.read_bytes())
    data[-1] ^= 1
    unit.write_bytes(bytes(data))
    (part / "unit-000001.safetensors").unlink()
    (part / "unit-000007.safetensors").write_bytes(b"")
    (part / "quarantine").mkdir()
    (part / "quarantine" / "unit-000000.safetensors.abc").write_bytes(b"")
    (Path(copied) / "part-000002" / "sweep.json").unlink()
    assert sweep.verify(copied) == [
        ("part-000001/unit-000000.safetensors", "damaged"),
        ("part-000001/unit-000001.safetensors", "missing"),
        ("part-000001/quarantine/unit-000000.safetensors.abc", "doubled"),
        ("part-000001/unit-000007.safetensors", "not of this sweep"),
        ("part-000002/sweep.json", "missing"),
    ]
    assert sweep.status(copied).quarantined == ("part-000001/quarantine/unit-000000.safetensors.abc",)
    with pytest.raises(CheckpointError, match="was changed after it was written"):
        sweep.result(copied)


@pytest.mark.parametrize(
    ("part", "changed", "message"),
    [
        ("", {"parts": 10**15}, "says that there are 1000000000000000 parts, which cannot be"),
        ("", {"parts": "3"}, "says that there are '3' parts"),
        ("part-000000", {"units": 3}, "does not say what a sweep is"),
        ("part-000000", {"sizes": None}, "does not say what a sweep is"),
        ("part-000000", {"shape": [4]}, "does not say what a sweep is"),
        ("part-000000", {"format": "mechjax sweep 1"}, "has the format 'mechjax sweep 1', and this version"),
    ],
)
def test_status__of_a_forged_specification__refuses(copied, part, changed, message):
    path = Path(copied) / part / "sweep.json"
    page = json.loads(path.read_bytes())
    del page["sha256"]
    page |= changed
    path.write_text(json.dumps(page | {"sha256": digest_of(page)}))
    with pytest.raises(CheckpointError, match=message):
        sweep.status(copied)


def test_result__of_what_is_not_done__says_how_to_go_on(copied, tmp_path):
    os.unlink(f"{copied}/part-000001/unit-000001.safetensors")
    with pytest.raises(
        CheckpointError, match=r"unit-000001.safetensors` is missing: the sweep is not done. Run it"
    ):
        sweep.result(copied)
    for read in (sweep.result, sweep.status, sweep.verify):
        with pytest.raises(
            CheckpointError, match=r"holds no `sweep.json`: no sweep was begun there. `mechjax sweep"
        ):
            read(tmp_path / "none")


def test_status__of_a_folder_of_activation_patch__reads_it_too(tiny_model, tiny_tokens, tmp_path):
    scores = mj.patching.activation_patch(
        tiny_model, tiny_tokens, tiny_tokens[::-1], mj.metrics.logit_diff(1, 2), site="z", over=("layer",), folder=tmp_path
    )  # fmt: skip
    assert sweep.status(tmp_path).done and sweep.verify(tmp_path) == []
    same(sweep.result(tmp_path), scores)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "bert"}, "neither a model that ships"),
        (
            {"positions": ["S3"], "over": ["layer", "pos"], "site": "q"},
            "has no position `S3`; it has IO, S1, S2, END",
        ),
    ],
)
def test_run__of_what_cannot_be__teaches(page, tmp_path, changed, message):
    with pytest.raises((ArgumentError, CheckpointError), match=message):
        sweep.run(spec_of({**page, **changed}), tmp_path)
