"""Sweeps in a folder: killed and continued, they are what they would have been; another sweep is refused."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, SweepError, WriteError
from mechjax.patching import units
from mechjax.patching.sweep import Sweep
from mechjax.workers import Store
from tests.tolerances import TOL

UNITS = 9  # three layers, six positions, two at a time

SCRIPT = """
import sys, time
import jax
import mechjax as mj
from mechjax.workers import Store

jax.config.update("jax_numpy_dtype_promotion", "strict")
write = Store.write
Store.write = lambda self, key, data, **how: (time.sleep(0.02), write(self, key, data, **how))[1]
model = mj.init(mj.models.Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=3, n_heads=4, n_kv_heads=4, d_head=4,
    d_mlp=32), key=jax.random.key(0))
pair = jax.random.randint(jax.random.key(3), (2, 3, 6), 0, 50)
mj.patching.activation_patch(model, *pair, mj.metrics.logit_diff(1, 4), site="resid_pre", chunk_size=2,
    folder=sys.argv[1])
"""
FEW_BITS = SCRIPT.replace("pair =", "model = mj.models.quantize(model, 4, group=4)\npair =", 1)


@pytest.fixture(scope="module")
def pair():
    return jax.random.randint(jax.random.key(3), (2, 3, 6), 0, 50)


@pytest.fixture(scope="module")
def patch(tiny_model, pair):
    def run(folder, model=tiny_model, metric=None, **changed):
        metric = metric or mj.metrics.logit_diff(1, 4)
        how = {"site": "resid_pre", "chunk_size": 2} | changed
        return mj.patching.activation_patch(model, *pair, metric, folder=folder, **how)

    return run


@pytest.fixture(scope="module")
def done(patch, tmp_path_factory):
    """A folder that was swept at once, and its scores."""
    folder = tmp_path_factory.mktemp("done") / "sweep"
    return folder, patch(folder)


def same(scores, expected):
    for name in ("scores", "per_example", "clean", "corrupt"):
        np.testing.assert_array_equal(getattr(scores, name), getattr(expected, name))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_folder__swept_at_once__equals_the_sweep_without(done, patch):
    folder, scores = done
    np.testing.assert_allclose(scores.per_example, patch(None).per_example, **TOL["float32", "sweep"])
    names = (f"unit-{i:06d}.safetensors" for i in range(UNITS))
    assert sorted(files(folder)) == ["runs.safetensors", "sweep.json", *names]


def test_folder__stopped_anywhere__goes_on_and_changes_nothing_that_was_done(
    done, patch, tmp_path, monkeypatch
):
    _, expected = done
    left = [1, 2, 5, 0]  # files until the next stop
    write, asked = Store.write, []

    def stops(self, key, data, **how):
        if key.startswith("."):
            return write(self, key, data, **how)
        if not left[0]:
            left.pop(0)
            raise KeyboardInterrupt
        left[0] -= 1
        asked.append(key)
        return write(self, key, data, **how)

    monkeypatch.setattr(Store, "write", stops)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            patch(tmp_path / "sweep")
    left.append(99)
    same(patch(tmp_path / "sweep"), expected)
    assert len(asked) == len(set(asked)) == UNITS + 2  # no file twice
    assert files(tmp_path / "sweep") == files(done[0])


def killed(folder, moments, script=SCRIPT):
    """Sweeps in processes that are killed, at each moment, once there are so many files and a little later."""
    for n_files, later in moments:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(folder)], env=os.environ | {"PYTHONPATH": "."}
        )
        while process.poll() is None and (not folder.exists() or len(stamps(folder)) < n_files):
            time.sleep(0.002)
        time.sleep(later)
        process.send_signal(signal.SIGKILL)
        process.wait()


def stamps(folder):
    """When each file was written, to the nanosecond, and which file it is."""
    found = (
        path for path in folder.glob("[!.]*") if path.suffix in (".json", ".safetensors")
    )  # but what is being written, which has another name until it is whole
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in found}


def test_folder__killed_from_outside__goes_on(done, patch, tmp_path):
    folder = tmp_path / "sweep"
    killed(folder, [(4, 0.01)])
    before = stamps(folder)
    assert 4 <= len(before) < UNITS + 2
    same(patch(folder), done[1])
    assert files(folder) == files(done[0])
    assert before.items() <= stamps(folder).items()


@pytest.mark.slow
def test_folder__of_a_quantised_model_and_killed__goes_on_to_what_one_go_gives(
    done, patch, tiny_model, tmp_path
):
    few, folder = mj.models.quantize(tiny_model, 4, group=4), tmp_path / "sweep"
    at_once = patch(tmp_path / "at_once", model=few)
    killed(folder, [(4, 0.01)], FEW_BITS)
    before = stamps(folder)
    assert 4 <= len(before) < UNITS + 2
    for other in (tiny_model, mj.models.dequantize(few)):
        with pytest.raises(ArgumentError, match=r"`model` is \"\w+\.\.\.\" there and"):
            patch(folder, model=other)
    same(patch(folder, model=few), at_once)
    assert files(folder) == files(tmp_path / "at_once")
    assert before.items() <= stamps(folder).items()
    off, largest = (np.abs(scores).max() for scores in (at_once.scores - done[1].scores, done[1].scores))
    assert off > 0.01 * largest  # the control: it is another model's sweep


@pytest.mark.slow
def test_folder__killed_at_ten_random_moments__loses_and_doubles_nothing(done, patch, tmp_path):
    folder, rng, kept = tmp_path / "sweep", random.Random(0), {}
    for i in range(10):
        killed(folder, [(i, rng.random() * rng.choice([0.03, 3]))])
        assert kept.items() <= stamps(folder).items()  # what was done is never done again
        kept = stamps(folder)
    same(patch(folder), done[1])
    assert kept.items() <= stamps(folder).items()
    assert files(folder) == files(done[0])


@pytest.mark.slow
def test_folder__filled_by_two_processes_at_once__is_shared(done, patch, tmp_path):
    folder = tmp_path / "sweep"
    begin = lambda: subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)], env=os.environ | {"PYTHONPATH": "."}
    )
    workers = [begin(), begin()]
    while workers[0].poll() is None and (not folder.exists() or len(stamps(folder)) < 4):
        time.sleep(0.002)
    before = stamps(folder)
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    assert before.items() <= stamps(folder).items()
    assert files(folder) == files(done[0])
    same(patch(folder), done[1])


def test_folder__with_a_unit_that_fails__says_so_and_has_the_rest(done, patch, tmp_path, monkeypatch):
    real = Sweep.scores_of

    def poisoned(sweep, runs, layer, cells, start):
        if int(layer) == 1:
            raise ValueError("poison")
        return real(sweep, runs, layer, cells, start)

    monkeypatch.setattr(Sweep, "scores_of", poisoned)
    said = r"3 of 9 units in `.*` failed three times, and were set aside; the first, `unit-000003.safetensors`, with "
    with pytest.raises(SweepError, match=rf"{said}ValueError: poison. Tracebacks are in `.*failed/`"):
        patch(tmp_path)
    assert len(list(tmp_path.glob("unit-*"))) == UNITS - 3
    monkeypatch.setattr(Sweep, "scores_of", real)
    with pytest.raises(SweepError, match=r"delete that folder to try again\.$"):
        patch(tmp_path)
    for page in (tmp_path / "failed").iterdir():
        page.write_text(page.read_text().replace("poison", "RESOURCE_EXHAUSTED: Out of memory"))
    with pytest.raises(
        SweepError, match="Memory ran out: sweep in another folder with chunk_size=1, half of this"
    ):
        patch(tmp_path, chunk_size=None)  # it is that of the folder
    shutil.rmtree(tmp_path / "failed")
    same(patch(tmp_path), done[1])
    assert files(tmp_path) == files(done[0])


def test_folder__on_storage_without_leases__is_refused_before_it_is_asked(patch):
    with pytest.raises(ArgumentError, match="`s3://bucket-of-mine/sweep` cannot hold leases"):
        patch("s3://bucket-of-mine/sweep")


def test_folder__continued__shows_how_far_it_was(patch, tmp_path, monkeypatch):
    shown, left, write = [], [6], Store.write

    class Shown:
        def begin(self, description):
            shown.append(description)

        def advance(self, steps=1):
            shown.append(steps)

    @contextmanager
    def bar(description, total):
        shown.extend((description, total))
        yield Shown()

    def stops(self, key, data, **how):
        if not key.startswith("."):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return write(self, key, data, **how)

    monkeypatch.setattr(units, "bar", bar)
    monkeypatch.setattr(Store, "write", stops)
    with pytest.raises(KeyboardInterrupt):
        patch(tmp_path)
    what = "Patching resid_pre"
    assert shown == [what, UNITS, what, 1, 1, 1, 1]  # its specification and both runs are the first files
    shown.clear()
    left[0] = 99
    patch(tmp_path)
    assert shown == [what, UNITS, 4, what, *[1] * (UNITS - 4)]
    shown.clear()
    patch(tmp_path)
    assert shown == []  # nothing is run, and nothing shown, where all is done


def test_folder__of_a_run_that_is_not_finite__stays_without_units(patch, tiny_model, tmp_path):
    broken = eqx.tree_at(
        lambda m: m.blocks.mlp.W_out, tiny_model, tiny_model.blocks.mlp.W_out.at[2].set(np.nan)
    )
    with pytest.raises(ArgumentError, match="`mlp_out` of layer 2 is not finite in this run"):
        patch(tmp_path, model=broken)
    assert list(files(tmp_path)) == ["sweep.json"]


@pytest.mark.slow
def test_folder__of_all_layers_and_named_positions__equals_the_sweep_without(patch, tmp_path):
    how = {"over": ("pos",), "positions": {"first": jnp.array([0, 1, 2]), "end": jnp.array([5, 5, 5])}}
    same(patch(tmp_path, **how), patch(tmp_path, **how))
    np.testing.assert_allclose(
        patch(tmp_path, **how).scores, patch(None, **how).scores, **TOL["float32", "sweep"]
    )


def test_folder__of_another_sweep__is_refused_with_what_differs(done, patch, tiny_model):
    folder, _ = done
    other = eqx.tree_at(lambda m: m.W_E, tiny_model, tiny_model.W_E + 1)
    for changed, said in [
        ({"model": other}, r"`model` is \"\w+\.\.\.\" there and"),
        ({"metric": mj.metrics.logit_diff(1, 5)}, '`metric` is "LogitDiff'),
        ({"site": "z", "over": ("layer", "pos")}, '`site` is "resid_pre" there and "z" here'),
        ({"mode": "noise"}, '`mode` is "denoise" there and "noise" here. Go on'),
        ({"over": ("pos", "layer")}, r'`over` is \["layer", "pos"\] there and \["pos", "layer"\] here'),
        ({"chunk_size": 3}, "`chunk_size` is 2 there and 3 here"),
    ]:
        with pytest.raises(ArgumentError, match=said):
            patch(folder, **changed)


def test_folder__that_is_broken__teaches(done, patch, tmp_path):
    whole, unit = files(done[0]), "unit-000003.safetensors"

    def broken(name, data):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for other, content in (whole | {name: data}).items():
            if content is not None:
                (folder / other).write_bytes(content)
        return folder

    changed = bytearray(whole[unit])
    changed[-1] ^= 1
    page = json.loads(whole["sweep.json"])
    for name, data, said in [
        (unit, whole[unit][:-3], "is not whole: .*Delete it, and it is swept again"),
        (unit, bytes(changed), "was changed after it was written"),
        ("runs.safetensors", whole["runs.safetensors"][:-1], "is not whole: .*Delete it"),
        (unit, whole["unit-000004.safetensors"], "was changed after it was written, or is of another sweep"),
        ("sweep.json", b"{", "sweep.json` is not whole, or was changed"),
        ("sweep.json", json.dumps(page | {"site": "z"}).encode(), "sweep.json` is not whole, or was changed"),
        ("sweep.json", None, "holds units, but no `sweep.json`"),
    ]:
        with pytest.raises(CheckpointError, match=said):
            patch(broken(name, data))
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="Choose a folder that can be written"):
        patch(tmp_path / "file" / "sweep")


def test_folder__inside_jit__is_refused(patch, tiny_model, tmp_path):
    with pytest.raises(ArgumentError, match="inside `jit` or `vmap` cannot write to"):
        eqx.filter_jit(lambda model: patch(tmp_path, model=model).scores)(tiny_model)
