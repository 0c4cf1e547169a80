"""A process that dies at any moment of any write leaves the old artefact, or the new one, and `verify` content."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.artefacts import verify
from mechjax.base import atomic
from mechjax.base.errors import CheckpointError, WriteError
from mechjax.dictlearn.kept import trimmed
from mechjax.fit import save_checkpoint, saved_steps
from mechjax.viz.html import tag
from mechjax.viz.page import Page
from tests.artefacts.made import MADE, model, place, prompts
from tests.needs import KILLS


class PowerCut(BaseException):
    """What no code of ours catches as an error: nothing after it runs, as in a process that is killed."""


class Disk:
    """Stands in for `os` where files are written: counts what reaches the disk, and refuses all from some moment on."""

    def __init__(self, monkeypatch, last):
        self.done, self.last, self.dead = 0, last, False
        monkeypatch.setattr(atomic, "os", self)
        for owner, name in (
            (Path, "unlink"),
            (Path, "mkdir"),
            (shutil, "rmtree"),
            (shutil, "copymode"),
            (Path, "open"),
        ):
            monkeypatch.setattr(owner, name, self._unless_dead(getattr(owner, name)))
        monkeypatch.setattr(atomic, "_exchange", self._counted(atomic._exchange))

    def __getattr__(self, name):
        real = getattr(os, name)
        return self._counted(real) if name in ("fsync", "replace") else real

    def _unless_dead(self, real):
        def call(*args, **kwargs):
            if self.dead:
                raise PowerCut
            return real(*args, **kwargs)

        return call

    def _counted(self, real):
        def call(*args, **kwargs):
            if self.dead or self.done == self.last:
                self.dead = True
                raise PowerCut
            self.done += 1
            return real(*args, **kwargs)

        return call


def _page(path, number):
    return Page("T", tag("p", f"number {number}")).write(path / "page.html", number=number)


def _step(path, number):
    if number == 0:
        MADE["step"].write(path, 0)
    else:
        save_checkpoint(path, 2, {"w": jnp.arange(3.0)})


def _metrics(path, number):
    path.mkdir(exist_ok=True)
    if number == 0:
        (path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    else:
        trimmed(path / "metrics.jsonl", 1)


def _store(path, number):
    """A store that is broken off after its first shard, and gone on with."""

    def some():
        for i in range(5):
            if number == 0 and i == 4:
                raise RuntimeError("broken off")
            yield prompts(i)

    try:
        mj.store.write(path, model(), some(), "resid_post", shard_rows=8)
    except RuntimeError:
        assert number == 0


def _sweep(path, number):
    if number == 0:
        MADE["sweep"].write(path, 0)
        for file in sorted(path.glob("unit-*"))[1:]:
            file.unlink()
    else:
        MADE["sweep"].write(path, 0)


def _text(name):
    return lambda path: (path / name).read_text()


WRITERS = {
    "record": (MADE["record"].write, MADE["record"].read, ""),
    "model": (MADE["model"].write, MADE["model"].read, ""),
    "saelens": (lambda path, number: MADE["saelens"].write(path / str(number), number), None, "0"),
    "store": (_store, None, ""),
    "checkpoint": (_step, lambda path: saved_steps(path), ""),
    "sweep": (_sweep, None, ""),
    "scoreboard": (MADE["scoreboard"].write, MADE["scoreboard"].read, ""),
    "circuit": (MADE["circuit"].write, MADE["circuit"].read, "circuit.json"),
    "page": (_page, _text("page.html"), None),
    "metrics": (_metrics, _text("metrics.jsonl"), None),
}


@pytest.mark.parametrize("kind", list(WRITERS))
def test_write__cut_off_at_every_moment__leaves_the_old_or_the_new_whole(kind, tmp_path):
    write, read, verified = WRITERS[kind]
    old, new = tmp_path / "old", tmp_path / "new"
    write(old, 0)
    shutil.copytree(old, new)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch, -1)
        write(new, 1)
    assert disk.done >= 2 or kind == "sweep", "nothing reached the disk through what makes writes atomic"
    right = [] if read is None else [read(old), read(new)]
    for moment in range(disk.done):
        at = tmp_path / "at" / f"{moment}"
        shutil.copytree(old, at)
        with pytest.MonkeyPatch.context() as patch:
            Disk(patch, moment)
            with pytest.raises(PowerCut):
                write(at, 1)
        if verified is not None:
            found = verify(at / verified)
            assert found.ok, (moment, found.problems)
        assert read is None or read(at) in right, moment
        with suppress(WriteError):  # of what is there whole, and is not written over
            write(at, 1)  # whoever comes after is not disturbed by what was left
        assert read is None or read(at) == right[1], moment


def test_write__first_of_all_and_cut_off__leaves_nothing_that_passes_for_whole(tmp_path):
    for kind in ("record", "model", "saelens", "circuit"):
        for moment in (0, 1):
            at = tmp_path / f"{kind}{moment}"
            with pytest.MonkeyPatch.context() as patch:
                Disk(patch, moment)
                with pytest.raises(PowerCut):
                    MADE[kind].write(at, 1)
            where = place(kind, at)
            if where.exists() and any(where.iterdir()):
                with pytest.raises(CheckpointError):
                    MADE[kind].read(at)


_CHILD = """
import sys, numpy as np
from pathlib import Path
from mechjax.base.atomic import replace_file
from mechjax.base.records import save
from mechjax.store import Moments
at = Path(sys.argv[1])
for number in range(10**6):
    save(Moments(np.full(3000, float(number)), np.zeros(3000), number), at / "record")
    replace_file(at / "page", b"%d," % number * 9999)
    print(number, flush=True)
"""


@KILLS
def test_write__by_a_process_that_is_killed__leaves_a_whole_record(tmp_path):
    for saves in (2, 7):
        with subprocess.Popen([sys.executable, "-c", _CHILD, tmp_path], stdout=subprocess.PIPE) as child:
            try:
                for _ in range(saves):
                    assert child.stdout.readline()
            finally:
                child.send_signal(signal.SIGKILL)
        assert verify(tmp_path / "record").ok
        found = mj.restore(tmp_path / "record")
        assert (found.mean == found.count).all()
        numbers = (tmp_path / "page").read_text().split(",")[:-1]
        assert len(numbers) == 9999 and len(set(numbers)) == 1
