"""What is said when a process of several is ended from outside."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import mechjax as mj
from mechjax.parallel.last_words import last_words
from tests.needs import KILLS

CHILD = """
import os, signal, sys
import jax
jax.process_count = lambda: 2
from mechjax.parallel.last_words import last_words
with last_words("Go on."):
    sys.stdout.write("inside"); sys.stdout.flush()
    {end}
"""


def ended(end):
    done = subprocess.run(
        [sys.executable, "-c", CHILD.format(end=end)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(mj.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout == "inside", done.stderr
    return done.returncode, done.stderr


@KILLS
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGABRT])
def test_last_words__of_a_process_that_is_ended__are_said(end):
    code, said = ended(f"os.kill(os.getpid(), {int(end)})")
    assert code == -end
    assert "Process 0 of 2 was ended, as happens some time after another of the run has died. Go on." in said


@pytest.mark.parametrize(("end", "code"), [("pass", 0), ("raise SystemExit(3)", 3)])
def test_last_words__of_one_that_ends_by_itself__are_none(end, code):
    assert ended(end) == (code, "")


def test_last_words__of_an_error_of_jax__are_its_note():
    code, said = ended("raise jax.errors.JaxRuntimeError('Connection closed by peer')")
    assert code == 1 and said.rstrip().endswith("Where another process of the run has died: Go on.")


def test_last_words__of_one_process__start_nothing(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with last_words("Go on."):
        pass
