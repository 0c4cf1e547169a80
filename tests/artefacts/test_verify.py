"""What `verify` recognises, what it says, and what it leaves alone."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import mechjax as mj
from mechjax.artefacts import Verified, verify
from mechjax.base.digests import arrays_digest, tree_digest
from mechjax.base.errors import ArgumentError
from mechjax.base.provenance import read_provenance
from mechjax.base.signed import page_digest, signed, unsigned
from mechjax.fit import save_checkpoint, saved_steps
from mechjax.store import Moments
from tests.artefacts import apart
from tests.artefacts.made import MADE, files, model, place, prompts


def flip(path, at, bit=3):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture
def record(tmp_path):
    return mj.save(Moments(np.arange(9.0), np.ones(9), 4), tmp_path / "record", seed=1)


def test_verify__of_a_record__names_the_array_in_it(record):
    file = next(record.glob("*.safetensors"))
    flip(file, file.stat().st_size - 1)  # arrays lie in the order of their names
    found = verify(record)
    assert isinstance(found, Verified) and not found.ok
    assert found.problems == (f"{file.name} was changed (squares)",)
    assert (found.kind, found.damaged) == ("record", (file.name,))
    assert dict(zip(found.files, found.whole.tolist(), strict=True)) == {
        "record.json": True,
        file.name: False,
    }
    flip(file, file.stat().st_size - 1)
    flip(file, 30)
    assert verify(record).problems == (f"{file.name} was changed (the header)",)


def test_verify__of_a_record_without_its_page__misses_it(record):
    (record / "record.json").unlink()
    assert verify(record).problems == ("record.json is missing",)


def test_verify__of_arrays_that_were_left_behind__says_so(record):
    (record / f"{'0' * 64}.safetensors").write_bytes(b"")
    found = verify(record)
    assert found.ok and found.notes == ("1 files of arrays belong to no record any more",)


def test_verify__of_an_exported_model__names_the_tensor_and_what_is_not_listed(tmp_path):
    folder = mj.export(model(), tmp_path / "m", family="mechjax")
    weights = folder / "model.safetensors"
    names = sorted(safetensors.numpy.load_file(weights))
    flip(weights, weights.stat().st_size - 1)
    (folder / "notes.txt").write_text("mine")
    found = verify(folder)
    assert found.damaged == ("model.safetensors",)
    assert found.problems[0].startswith("model.safetensors was changed (") and found.problems[0][
        :-1
    ].endswith(tuple(names))
    assert found.notes == ("not listed, so not compared: notes.txt",)
    made = found.provenance[0].made_from[0]
    assert (made.name, made.digest) == ("model", tree_digest(model()))


def test_verify__of_a_list_that_names_other_folders__looks_into_none(tmp_path):
    folder = mj.export(model(), tmp_path / "m", family="mechjax")
    (tmp_path / "secret").write_text("x")
    page = unsigned((folder / "mechjax.json").read_bytes())
    told = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    for name in ("../secret", str(tmp_path / "secret"), "..\\secret", "link"):
        page["files"][name] = told
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "mechjax.json").write_bytes(signed(page))
    found = verify(folder)
    assert set(found.damaged) == {"../secret", str(tmp_path / "secret"), "..\\secret", "link"}
    assert any("is a link that leaves its folder" in problem for problem in found.problems)


def test_verify__of_a_model_that_nobody_listed__says_that_it_is_only_consistent(tmp_path):
    folder = mj.export(model(), tmp_path / "m", family="gpt2")
    (folder / "mechjax.json").unlink()
    found = verify(folder)
    assert (found.kind, found.ok, found.summed) == ("model", True, False)
    assert "no checksums of all of these files are known" in found.notes[0]
    os.truncate(folder / "model.safetensors", 2000)
    assert "model.safetensors is truncated" in verify(folder).problems[0].replace("`", "")
    (folder / "config.json").write_text("{")
    assert verify(folder).damaged == ("config.json", "model.safetensors")


def _cached(folder):
    """A folder as in the Hub's cache, where links lead to files that are called by their checksums."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    mj.export(model(), snapshot, family="gpt2")
    (snapshot / "mechjax.json").unlink()
    blobs.mkdir()
    for file in snapshot.iterdir():
        data = file.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        name = hashlib.sha256(data).hexdigest() if file.suffix == ".safetensors" else git
        file.rename(blobs / name)
        file.symlink_to(blobs / name)
    return snapshot


def test_verify__of_the_hubs_cache__compares_files_with_their_names(tmp_path):
    snapshot = _cached(tmp_path)
    found = verify(snapshot)
    assert found.ok and found.summed and found.kind == "model"
    for name in ("model.safetensors", "config.json"):
        data = (snapshot / name).resolve().read_bytes()
        (snapshot / name).resolve().write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        assert name in verify(snapshot).damaged
        (snapshot / name).resolve().write_bytes(data)


def test_verify__of_shards_and_an_index_that_disagree__names_the_shard(tmp_path):
    folder = mj.export(model(), tmp_path / "m", family="gpt2")
    (folder / "mechjax.json").unlink()
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    safetensors.numpy.save_file(tensors, folder / "a.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(folder).ok and verify(folder).files[1:] == ("model.safetensors.index.json", "a.safetensors")
    os.truncate(folder / "a.safetensors", 900)
    assert verify(folder).damaged == ("a.safetensors",)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert verify(folder).damaged == ("model.safetensors.index.json",)


@pytest.fixture
def run(tmp_path):
    for step in (1, 2):
        save_checkpoint(
            tmp_path / "run", step, {"a": jnp.arange(4000.0) + step, "b": jnp.ones(3)}, made_from={"seed": 5}
        )
    return tmp_path / "run"


def test_verify__of_a_run__looks_at_every_step_and_names_the_array(run):
    found = verify(run)
    assert found.ok and found.kind == "training run"
    saved, seed = found.provenance[0].made_from
    assert (saved.name, saved.dtypes, saved.digest, seed.value) == ("saved", ("float32",), None, 5)
    data = max((p for p in (run / "2").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(data, data.stat().st_size // 2)
    found = verify(run)
    name = data.relative_to(run).as_posix()
    assert found.damaged == (name,)
    assert found.problems == (f"{name} was changed (a)",)
    assert verify(run / "1").ok and not verify(run / "2").ok


def test_verify__of_steps_that_are_not_finished__tells_them_apart_from_damage(run):
    (run / "2" / "checksums.0-of-1.json").unlink()
    found = verify(run)
    assert found.ok and "step 2: no checksums, so no checkpoint" in found.notes[0]
    assert saved_steps(run) == (1,)
    assert "checksums.*.json is missing" in verify(run / "2").problems[0]
    (run / "1" / "checksums.0-of-1.json").unlink()
    assert "is missing in step 1, 2: no checksums" in verify(run).problems[0]


def test_verify__of_a_step_of_before_files_had_checksums__compares_its_arrays(run):
    path = run / "1" / "checksums.0-of-1.json"
    page = unsigned(path.read_bytes())
    path.write_bytes(signed({name: page[name] for name in ("format", "about", "arrays")}))
    found = verify(run / "1")
    assert found.ok and found.files == ("checksums.0-of-1.json",)
    assert "says nothing of where it comes from" in found.notes[0]
    data = max((p for p in (run / "1").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flip(data, data.stat().st_size // 2)
    assert verify(run / "1").problems == ("arrays are not what was written (a)",)
    path.write_bytes(signed({**page, "format": 2}))
    assert "has format 2, and this version reads 1" in verify(run / "1").problems[0]


def test_verify__of_a_step_with_more_files__says_that_they_are_not_part_of_it(run):
    (run / "1" / "notes.txt").write_text("mine")
    assert verify(run / "1").ok and "1 files were added later" in verify(run / "1").notes[0]


def test_verify__of_what_two_processes_wrote__is_content_and_says_what_each_held(tmp_path):
    codes, said = apart.two_processes(tmp_path)
    assert codes == [0, 0], said
    whole = np.arange(48, dtype=np.float32).reshape(apart.SHAPE)
    told = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert [one["together"] for one in told] == [tree_digest(whole)] * 2
    made = [read_provenance(one["page"]) for one in told]
    for i, one in enumerate(made):
        spread, copied, seed = one.made_from
        assert (one.devices, one.processes, seed.value) == (8, 2, 3)
        assert (copied.digest, copied.mesh) == (tree_digest(whole), (("data", 2), ("model", 4)))
        assert (spread.digest, spread.held, spread.mesh) == (None, f"process {i} of 2", copied.mesh)
    assert made[0].made_from[0].arrays != made[1].made_from[0].arrays
    found = verify(tmp_path / "run")
    step = tmp_path / "run" / "5"
    assert found.ok and set(found.files) == {f"5/{file.relative_to(step)}" for file in files(step)}
    assert {"5/checksums.0-of-2.json", "5/checksums.1-of-2.json"} <= set(found.files)
    for data in sorted(step.glob("ocdbt.process_*/d/*"))[:2]:
        flip(data, data.stat().st_size // 2)
        assert verify(step).damaged == (data.relative_to(step).as_posix(),)
        flip(data, data.stat().st_size // 2)
    (step / "checksums.1-of-2.json").unlink()
    assert "of each process that wrote the step there is one" in " ".join(verify(step).problems)


def test_verify__of_a_store_that_is_not_done__says_how_far_it_is(tmp_path):
    def some():
        yield from (prompts(i) for i in range(3))
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        mj.store.write(tmp_path / "s", model(), some(), "resid_post", shard_rows=8)
    found = verify(tmp_path / "s")
    assert found.ok and found.notes == ("not complete: writing broke off after 8 rows",)
    assert found.provenance[0].devices == jax.device_count()
    every = [prompts(i) for i in range(3)]
    mj.store.write(tmp_path / "s", model(), every, "resid_post", shard_rows=8)
    found = verify(tmp_path / "s")
    assert found.ok and not found.notes and len(found.provenance) == 1
    shard = "array-000/c/0/0"
    flip(tmp_path / "s" / shard, 10)
    assert f"{shard} shard 0 of `resid_post` of layer 0" in verify(tmp_path / "s").problems[0]
    mj.store.repair(tmp_path / "s", model(), every)
    assert verify(tmp_path / "s").ok
    (tmp_path / "s" / "manifest.json").unlink()
    assert verify(tmp_path / "s").problems == ("manifest.json is missing",)


def test_store__gone_on_with_by_other_code__says_where_all_of_it_comes_from(tmp_path, monkeypatch):
    monkeypatch.setattr("mechjax.base.provenance.code_digest", lambda: "0" * 64)
    with pytest.raises(TypeError):
        mj.store.write(tmp_path / "s", model(), [prompts(), prompts(1), 3], "resid_post", shard_rows=8)
    monkeypatch.undo()
    store = mj.store.write(tmp_path / "s", model(), [prompts(), prompts(1)], "resid_post", shard_rows=8)
    first, last = store.manifest.made
    assert (first.code, last.code == first.code) == ("0" * 64, False)
    assert mj.store.read(tmp_path / "s").manifest.made == (first, last)
    assert mj.save(prompts(), tmp_path / "r", store=store)
    assert mj.provenance(tmp_path / "r").made_from[0].digest == store.digest


@pytest.mark.parametrize("version", [1, 2])
def test_verify__of_a_sweep__tells_units_of_others_apart(tmp_path, version):
    scores = np.arange(6.0).reshape(2, 3)
    page = {"format": f"mechjax sweep {version}", "model": "m", "clean": "c", "corrupt": "d", "units": 3}
    (tmp_path / "sweep.json").write_bytes(signed(page, "indented"))

    def unit(number, of, name=None, **changed):
        name = name or f"unit-{number:06d}.safetensors"
        digest = tree_digest(scores) if version == 1 else arrays_digest({"scores": scores})
        told = {"format": f"mechjax sweep {version}", "unit": number if version == 1 else name, "specification": of,
                "sha256": digest}  # fmt: skip
        head = {"mechjax": json.dumps(told | changed)}
        (tmp_path / name).write_bytes(safetensors.numpy.save({"scores": scores}, head))
        return name

    for number in (0, 1):
        unit(number, page_digest(page))
    found = verify(tmp_path)
    if version == 2:
        assert found.problems == ("runs.safetensors is missing",)
        unit(0, page_digest(page), "runs.safetensors")
        found = verify(tmp_path)
    assert found.ok and found.kind == "sweep" and len(found.files) == 2 + version
    assert "not done: 2 of 3 units are there" in found.notes[0]
    assert "is of another sweep" in verify_one(tmp_path, unit(2, "0" * 64))
    assert "its name is not in it" in verify_one(tmp_path, unit(2, page_digest(page), unit=7))
    assert "its name is not in it" in verify_one(
        tmp_path, unit(2, page_digest(page), format="mechjax sweep 9")
    )
    assert "the checksum of its numbers differs (scores)" in verify_one(
        tmp_path, unit(2, page_digest(page), sha256="0" * 64)
    )
    (tmp_path / "sweep.json").write_bytes(signed({**page, "format": "mechjax sweep 9"}))
    assert "which this mechjax does not know" in verify(tmp_path).problems[0]
    (tmp_path / "sweep.json").unlink()
    assert "sweep.json is missing: nothing says of which sweep" in verify(tmp_path).problems[0]


def verify_one(folder, name):
    found = verify(folder)
    assert found.damaged == (name,)
    return found.problems[0]


def test_verify__of_pages_of_others_or_of_before__says_that_they_have_no_checksum(tmp_path):
    MADE["circuit"].write(tmp_path, 0)
    page = json.loads((tmp_path / "circuit.json").read_text())
    (tmp_path / "circuit.json").write_text(
        json.dumps({name: page[name] for name in ("cfg", "nodes", "edges")})
    )
    found = verify(tmp_path / "circuit.json")
    assert found.ok and not found.summed and "it has no checksum" in found.notes[0]
    MADE["circuit"].read(tmp_path)
    found = verify(Path(mj.__file__).parents[1] / "benchmarks")
    assert found.ok and found.kind == "scoreboard" and not found.summed


def test_verify__of_two_artefacts_in_one_folder__looks_at_both(record):
    MADE["scoreboard"].write(record, 0)
    found = verify(record)
    assert found.kind == "record and scoreboard" and found.ok
    flip(record / "results" / "scoreboard.json", 40)
    assert verify(record).damaged == ("results/scoreboard.json",)


def test_verify__of_nothing_that_it_knows__says_what_would_be(tmp_path, record):
    with pytest.raises(
        ArgumentError, match=r"there is nothing at .*none`. Give a folder or file that mechjax wrote"
    ):
        verify(tmp_path / "none")
    with pytest.raises(
        ArgumentError,
        match=r"holds nothing that has checksums of mechjax\. Verify `.*record`\. What has: record: ",
    ):
        verify(tmp_path)
    with pytest.raises(ArgumentError, match=r"Verify `.*record`\."):
        verify(record / "record.json")


def test_verify__without_a_device_or_a_model__works(tmp_path):
    """In a process whose JAX cannot start, and in which unpickling anything ends it."""
    for kind in MADE:
        MADE[kind].write(tmp_path / kind, 0)
    shutil.copy(tmp_path / "circuit" / "circuit.json", tmp_path / "circuit.json")
    places = [str(place(kind, tmp_path / kind)) for kind in MADE]
    code = """
import pickle, sys
def refuse(*_, **__): raise SystemExit("unpickled")
pickle.load = pickle.loads = pickle.Unpickler = refuse
import mechjax as mj
for path in sys.argv[1:]:
    found = mj.verify(path)
    assert found.ok and found.summed, found.problems
assert "mechjax.models.decoder" in sys.modules
import jax
try:
    jax.devices()
except RuntimeError:
    print("no device")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *places], env={**os.environ, "JAX_PLATFORMS": "none_such"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "no device\n", done.stderr
