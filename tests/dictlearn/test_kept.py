"""Runs that go on: to the bit after being killed anywhere, and never from what is broken or another run's."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.artefacts import verify
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.base.signed import signed
from mechjax.dictlearn import train
from mechjax.fit import saved_steps
from tests.dictionaries.kinds import drawn, tokens
from tests.dictlearn import apart

KEY = jax.random.key(0)


def run(folder, steps=12, stop=None, **more):
    """A run of 12 steps; `stop` ends its batches early, as if it had been killed there."""
    how = {"learning_rate": 1e-3, "key": KEY, "steps_per_call": 2, "save_every": 4, "checkpoints": folder}
    given = [tokens(i, 16) for i in range(steps if stop is None else stop)]
    return train(drawn("top_k"), given, steps=steps, **how | more)


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run that ended after 10 steps, and what it would have come to."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.raises(ArgumentError, match="ended after 10 of 12 steps"):
        run(folder, stop=10)
    return folder, apart.digest(run(None))


def copied(broken_off, tmp_path):
    shutil.copytree(broken_off[0], tmp_path / "run")
    return tmp_path / "run"


def test_train__that_was_broken_off__goes_on_to_the_same_bits(broken_off, tmp_path):
    folder = copied(broken_off, tmp_path)
    assert saved_steps(folder) == (4, 8)
    assert apart.digest(run(folder)) == broken_off[1]
    assert saved_steps(folder) == (8, 12)
    assert apart.digest(run(folder)) == broken_off[1]  # and a run that is done is what it was


def test_checkpoint__of_activations__says_what_it_was_made_from(tiny_model, tmp_path):
    prompts = [np.arange(16).reshape(2, 8) % tiny_model.config.d_vocab + i for i in range(8)]

    def kept(name, model, key):
        rows = mj.dictlearn.activations(model, prompts, "resid_post", layer=0, batch=4, buffer=8, key=KEY)
        first = mj.dictionaries.TopK.init(d_model=model.config.d_model, n_features=8, k=2, key=KEY)
        train(
            first, rows, steps=4, steps_per_call=2, learning_rate=1e-3, key=key, checkpoints=tmp_path / name
        )
        (made,) = verify(tmp_path / name / "4").provenance
        return {one.name: one for one in made.made_from}

    found = kept("run", tiny_model, KEY)
    assert (
        found["key"].value == "[0, 0]" and found["batches"].kind == "Shuffled" and found["steps"].value == 4
    )
    other = kept("other", jax.tree.map(lambda x: 2 * x, tiny_model), jax.random.key(3))
    assert other["key"].value == "[0, 3]" and other["batches"].digest != found["batches"].digest
    assert other["dictionary"].value == found["dictionary"].value


def test_train__with_metrics__tells_each_step_once(tmp_path):
    told = tmp_path / "told.jsonl"
    with pytest.raises(ArgumentError):
        run(tmp_path / "run", stop=10, metrics=told)
    assert len(told.read_text().splitlines()) == 10
    run(tmp_path / "run", metrics=told)
    assert [json.loads(line)["step"] for line in told.read_text().splitlines()] == [*range(1, 13)]
    told.write_text("not metrics\n")
    with pytest.raises(WriteError, match="holds lines that are no metrics of a run"):
        run(tmp_path / "run", metrics=told)


def test_train__of_another_run__is_refused(broken_off, tmp_path):
    folder = copied(broken_off, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"holds another run: .*learning_rate was 0\.001\d* and is 0\.01"
    ):
        run(folder, learning_rate=1e-2)
    with pytest.raises(CheckpointError, match="optimizer was adam of unit gradients and is adam"):
        run(folder, unit_gradients=False)
    with pytest.raises(ArgumentError, match="8 steps were done before, and `batches` ended after 3"):
        run(folder, stop=3)
    with pytest.raises(ArgumentError, match="save_every=0"):
        run(folder, save_every=0)


def test_train__from_a_changed_checkpoint__is_refused_by_name(broken_off, tmp_path):
    folder = copied(broken_off, tmp_path)
    data = max((p for p in (folder / "8").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    held = bytearray(data.read_bytes())
    for at in range(0, len(held), 64):  # one place alone may be what no array lies in
        held[at] ^= 1
    data.write_bytes(held)
    with pytest.raises(
        CheckpointError, match=r"(?s)step 8 in .* is broken: .*Remove the folder `8` to go on from step 4"
    ):
        run(folder)
    shutil.rmtree(folder / "8")
    assert apart.digest(run(folder)) == broken_off[1]


def test_train__from_changed_checksums_or_a_later_format__is_refused(broken_off, tmp_path):
    folder = copied(broken_off, tmp_path)
    page = next((folder / "8").glob("checksums.*.json"))
    whole = page.read_text()
    page.write_text(whole.replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="was changed after it was written: its checksum differs"):
        run(folder)
    page.write_text(whole[:-20])
    with pytest.raises(CheckpointError, match=r"`checksums\.0-of-1\.json` is not whole"):
        run(folder)
    later = json.loads(whole) | {"format": 2}
    del later["sha256"]
    page.write_bytes(signed(later))
    with pytest.raises(CheckpointError, match="has format 2, and this version reads 1"):
        run(folder)


def test_train__on_a_full_disk__says_so_and_keeps_what_is_whole(tmp_path):
    folder = tmp_path / "run"
    first = itertools.islice(apart.stream(), 10)
    with pytest.raises(ArgumentError, match="ended after 10 of 12 steps"):
        apart.begin(folder, None, 12, first)
    out, said = apart.ended("full", folder)
    assert f"the checkpoint of step 12 cannot be written to `{folder}`" in out, said[-2000:]
    assert "whole there: step 10, from which a run goes on" in out
    assert saved_steps(folder) == (8, 10)
    assert apart.digest(apart.begin(folder, None, 12, apart.stream())) == apart.digest(
        apart.begin(tmp_path / "other", None, 12, apart.stream())
    )


def test_shuffled__gone_on_with__gives_the_same_rows():
    whole = list(apart.stream())
    for done in (0, 3, 11, len(whole) - 1):
        first, second = apart.stream(), apart.stream()
        for _ in range(done):
            next(first)
        second.resume(first.state())
        rest = list(second)
        assert len(rest) == len(whole) - done
        for one, two in zip(rest, whole[done:], strict=True):
            np.testing.assert_array_equal(one, two)
    with pytest.raises(CheckpointError, match=r"had taken .* batches of prompts, and there are 1 now"):
        mj.dictlearn.shuffled([whole[0]], apart.B, 8 * apart.B, KEY).resume(first.state())


@pytest.mark.slow
@pytest.mark.parametrize(("kills", "steps"), [(20, 120)])
def test_train__killed_from_another_process__comes_to_the_same_bits(kills, steps, tmp_path):
    rng = np.random.default_rng(0)
    unbroken, _, said = apart.killed(tmp_path / "whole", tmp_path / "whole.jsonl", 0, steps, rng)
    assert len(unbroken) == 64, said
    found, at, said = apart.killed(tmp_path / "run", tmp_path / "run.jsonl", kills, steps, rng)
    assert found == unbroken, said
    assert len(at) == kills
    told = [json.loads(line)["step"] for line in (tmp_path / "run.jsonl").read_text().splitlines()]
    assert told == [*range(1, steps + 1)]


@pytest.mark.slow
def test_train__kept_on_a_mesh__goes_on_there_to_the_bit_and_elsewhere_closely(tmp_path):
    mesh = mj.make_mesh(data=2, model=4)
    with pytest.raises(ArgumentError):
        run(tmp_path / "run", stop=10, mesh=mesh)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    assert apart.digest(run(tmp_path / "run", mesh=mesh)) == apart.digest(run(None, mesh=mesh))
    moved = run(tmp_path / "other")
    np.testing.assert_allclose(moved.dictionary.W_dec, run(None).dictionary.W_dec, atol=1e-5)
