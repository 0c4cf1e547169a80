"""`mechjax sweep`: its verbs in this process, and the command lines that its help shows."""

import importlib
import json
import os
import re
import shlex
import signal

import jax
import pytest

import mechjax as mj
from mechjax.cli import main
from mechjax.models import Config
from mechjax.models.export import export
from mechjax.patching.sweep import Sweep
from mechjax.studies import sweep as study
from mechjax.studies.sweep_spec import spec_of
from mechjax.tasks.vocabulary import build_tokenizer
from mechjax.workers import Worked, opened

SWEEP = importlib.import_module("mechjax.cli.sweep")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    tokenizer = build_tokenizer()
    config = Config(d_vocab=tokenizer.vocab_size, n_ctx=64, d_model=16, n_layers=2, n_heads=2)
    folder = tmp_path_factory.mktemp("cli-sweep")
    model = export(mj.init(config, key=jax.random.key(0)), folder / "m", family="gpt2", tokenizer=tokenizer)
    page = {"model": str(model), "task": "ioi", "n": 6, "site": "z", "over": ["layer", "head"], "batch": 3}
    (folder / "spec.json").write_text(json.dumps(page))
    return str(folder / "spec.json")


def said(capsys):
    captured = capsys.readouterr()
    assert "Traceback (" not in captured.err + captured.out
    return captured.out + captured.err


def test_sweep__run_status_and_verify__say_what_there_is(spec, tmp_path, capsys):
    folder = str(tmp_path / "sweep")
    assert main(["sweep", "run", spec, folder, "--worker", "0", "--of", "2"]) == 0
    out = said(capsys)
    assert (
        "this worker did 2 units" in out
        and f"Other workers' units are left: mechjax sweep status {folder}" in out
    )
    assert main(["sweep", "status", folder]) == 0
    assert re.search(r"part-000001 +1 +0 +0 +1 *\n(.*\n)*all begun +2 +0 +0 +2", said(capsys))
    assert main(["sweep", "verify", folder]) == 1
    assert re.search(
        r"unit-000001.safetensors +missing *\n.*\n2 problems. `mechjax sweep run SPEC", said(capsys)
    )
    assert main(["sweep", "run", spec, folder, "--top", "2"]) == 0
    out = said(capsys)
    assert "this worker did 2 units" in out and "How much of the difference comes back" in out
    assert len(re.findall(r"layer \d, head \d", out)) == 2
    assert main(["sweep", "verify", folder]) == 0
    assert "every unit is there and whole" in said(capsys)


def test_sweep__with_a_unit_that_fails__exits_1_and_says_how_to_go_on(spec, tmp_path, capsys, monkeypatch):
    folder, real = str(tmp_path / "sweep"), Sweep.scores_of

    def poisoned(plan, runs, layer, cells, start):
        if int(layer) == 1:
            raise ValueError("[poison]")
        return real(plan, runs, layer, cells, start)

    monkeypatch.setattr(Sweep, "scores_of", poisoned)
    assert main(["sweep", "run", spec, folder]) == 1
    out = said(capsys)
    assert "2 units failed three times and were set aside" in out
    assert "part-000001/unit-000001.safetensors: ValueError: [poison]" in out
    assert f"Try again: mechjax sweep run {spec} {folder} --retry" in out
    assert main(["sweep", "status", folder]) == 0
    assert "part-000000/unit-000001.safetensors ValueError: [poison]" in said(capsys)
    monkeypatch.setattr(Sweep, "scores_of", real)
    opened(f"{folder}/part-000000").write("quarantine/unit-000000.safetensors.abc", b"")
    assert main(["sweep", "run", spec, folder, "--retry"]) == 1
    assert "Two workers found different results: part-000000/quarantine/unit-000000" in said(capsys)


def test_sweep__that_is_at_work__says_who_is_at_what(spec, tmp_path, capsys):
    folder = str(tmp_path / "sweep")
    main(["sweep", "run", spec, folder, "--worker", "0", "--of", "2"])
    lease = {"owner": "machine-7", "process": None, "attempt": 1, "expiry": 60, "beats": 3, "error": None}
    opened(f"{folder}/part-000000").write(".leases/unit-000001.safetensors", json.dumps(lease).encode())
    (tmp_path / "sweep" / "part-000001" / "sweep.json").unlink()
    said(capsys)
    assert main(["sweep", "status", folder]) == 0
    out = said(capsys)
    assert re.search(r"part-000000 +1 +1 +0 +0 +machine-7", out) and "1 of 2 parts are not begun" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "SPEC", "FOLDER", "--worker", "3"], "ArgumentError: worker=3 of=None: say both"),
        (["run", "SPEC", "FOLDER", "--expiry", "-1"], "ArgumentError: expiry=-1.0: seconds, more than 0"),
        (["run", "none.json", "FOLDER"], "CheckpointError: Cannot read `none.json`"),
        (
            ["run", "SPEC", "s3://bucket-of-mine/sweep"],
            "ArgumentError: .*cannot hold leases.*--worker 3 --of 16",
        ),
        (["run", "SPEC", "/proc/nothing"], "WriteError: cannot write `/proc/nothing/sweep.json`"),
        (["status", "FOLDER"], "CheckpointError: `.*` holds no `sweep.json`: no sweep was begun"),
        (["verify", "FOLDER"], "CheckpointError: `.*` holds no `sweep.json`: no sweep was begun"),
        (
            ["run", "SPEC", "FOLDER", "--distributed"],
            "ArgumentError: `--distributed`: JAX finds no other processes",
        ),
    ],
)
def test_sweep__of_what_cannot_be__prints_the_error_and_exits_2(spec, tmp_path, capsys, argv, message):
    given = [{"SPEC": spec, "FOLDER": str(tmp_path / "new")}.get(word, word) for word in argv]
    assert main(["sweep", *given]) == 2
    assert re.search(message, said(capsys))
    assert not (tmp_path / "new").exists()


def test_sweep__told_to_end__gives_its_unit_back(spec, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Sweep, "scores_of", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sweep", "run", spec, str(tmp_path)]) == 130
    assert "interrupted" in said(capsys)
    assert signal.getsignal(signal.SIGTERM) == before
    [left] = [part for _, part in study.status(tmp_path).parts if part is not None]
    assert len(left.left) == 2 and not left.leased


def test_help__of_the_verb__shows_command_lines_that_can_be_given(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    assert stop.value.code == 0 and "sbatch --array=0-15" in said(capsys)
    text = SWEEP.__doc__.replace("\\\n", " ")
    lines = [re.split("[\"'\n]", line)[0] for line in re.findall(r"mechjax (sweep run s.*)", text)]
    assert len(lines) == 5
    given = []
    monkeypatch.setattr(study, "run", lambda spec, folder, **how: (given.append((folder, how)), Worked())[1])
    monkeypatch.setattr(study, "status", lambda folder: study.SweepStatus((("", None),)))
    monkeypatch.setattr(SWEEP, "_meet", lambda: given.append("met"))
    monkeypatch.chdir(tmp_path)
    pages = [json.loads(page) for page in re.findall(r"^ +(\{.*\})$", text, re.M)]
    assert [spec_of(page).pairs for page in pages] == [64, 1]
    (tmp_path / "spec.json").write_text(json.dumps(pages[0]))
    for line in lines:
        assert main(shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "3"))) == 0
    assert given.count("met") == 2
    assert said(capsys).count("not tried by mechjax's tests") == 2
    found = [(folder, how["sharing"]) for folder, how in (g for g in given if g != "met")]
    places = [folder for folder, _ in found]
    assert places == ["/shared/sweep", "/shared/sweep", "gs://bucket/sweep", "sweep", "s3://bucket/sweep"]
    assert [sharing.worker for _, sharing in found] == [None] * 4 + [3] and found[-1][1].of == 16
