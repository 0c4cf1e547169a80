"""`mechjax plan`: what is printed, and what is refused."""

import re

import jax
import jax.numpy as jnp
import pytest

import mechjax as mj
from mechjax.cli import main
from mechjax.models import Config
from mechjax.models.export import export


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = Config(d_vocab=50, n_ctx=24, d_model=16, n_layers=2, n_heads=4)
    folder = tmp_path_factory.mktemp("plan") / "model"
    return str(export(mj.init(config, key=jax.random.key(0)), folder, family="gpt2"))


def test_plan__of_a_model__prints_facts_and_an_aligned_table(model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main(["plan", model, "--batch", "2", "--pos", "8", "--capture", "z", "resid_post"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"parameters +7.8 thousand, 30.4 KiB in float32", said)
    assert re.search(r"captured +4.0 KiB: z 2.0 KiB, resid_post 2.0 KiB", said)
    lines = said.splitlines()
    rows = {line.split()[0]: line for line in lines if "×" in line and "float32" in line}
    assert list(rows) == list(mj.list_sites(mj.load(model)[0], jnp.zeros((1, 2), int)))
    assert re.search(
        r"^z +2 layer × 2 batch × 8 pos × 4 head × 4 d_head +float32 +2.0 KiB +captured", rows["z"]
    )
    assert rows["result"].rstrip().endswith("on request")
    assert len({line.index("float32") for line in rows.values()}) == 1
    assert len({re.search(r"(KiB|B)(?= |$)", line).end() for line in rows.values()}) == 1


def test_plan__without_a_length__takes_what_the_model_has(model, capsys):
    assert main(["plan", model]) == 0
    assert "1 × 24 = 24" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pos", "99"], "ShapeError: 99 tokens, but the model has 24 learned positions"),
        (["--capture", "zz"], "SiteError: no site is named `zz`. Did you mean `z`"),
        (["--dtype", "int4"], "ArgumentError: dtype='int4' is no floating dtype"),
        (["--mesh", "2", "4"], "ArgumentError: .* none were named"),
    ],
)
def test_plan__of_what_cannot_be__exits_2(model, capsys, options, message):
    assert main(["plan", model, *options]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
