"""The command line: what is printed, what is refused, and with which exit status."""

import re
import shutil

import jax
import pytest

import mechjax as mj
from mechjax.cli import main
from mechjax.models import Config
from mechjax.models.export import export
from mechjax.tasks.vocabulary import build_tokenizer

CLEAN = "When Mary and John went to the store, John gave a ring to"
CORRUPT = "When Mary and John went to the store, Mary gave a ring to"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    tokenizer = build_tokenizer()
    config = Config(d_vocab=tokenizer.vocab_size, n_ctx=32, d_model=16, n_layers=2, n_heads=2)
    folder = tmp_path_factory.mktemp("cli") / "model"
    return str(export(mj.init(config, key=jax.random.key(0)), folder, family="gpt2", tokenizer=tokenizer))


def _patch(model, *more, clean=CLEAN, corrupt=CORRUPT, answer="Mary", wrong="John"):
    options = ["--clean", clean, "--corrupt", corrupt, "--answer", answer, "--wrong", wrong]
    return main(["patch", model, *options, *more])


def test_patch__of_two_prompts__prints_places_by_their_words(model, capsys, tmp_path):
    assert _patch(model, "--page", str(tmp_path / "p.html")) == 0
    said = capsys.readouterr().out
    assert re.search(r"`Mary` over `John`, in logits: -?\d", said)
    assert "layer 0" in said
    assert re.search(r"1\.00 +layer 0, John/Mary", said)
    assert "p.html" in said
    page = (tmp_path / "p.html").read_text()
    assert "John/Mary" in page
    assert re.search(r"<th[^>]*>model</th><td>Decoder, float32, sha256 [0-9a-f]{12}</td>", page)
    assert str(tmp_path) not in page and model not in page.partition("<details")[2]


def test_patch__over_heads__prints_heads(model, capsys):
    assert _patch(model, "--site", "z", "--over", "layer", "head", "--mode", "noise") == 0
    said = capsys.readouterr().out
    assert "head 1" in said
    assert "How much of the difference goes" in said


def test_patch__in_a_folder__goes_on_with_that_sweep_alone(model, capsys, tmp_path):
    heads = ("--site", "z", "--over", "layer", "head", "--folder", str(tmp_path))
    assert _patch(model, *heads) == 0
    said = capsys.readouterr().out
    (tmp_path / "unit-000001.safetensors").unlink()
    assert _patch(model, *heads) == 0
    assert capsys.readouterr().out == said
    assert _patch(model, *heads, "--mode", "noise") == 2
    assert re.search('`mode` is "denoise" there and "noise" here', capsys.readouterr().err)


def test_sites__of_a_model__says_what_each_is(model, capsys):
    assert main(["sites", model]) == 0
    said = capsys.readouterr().out
    assert "8 pos × 2 head × 8 d_head in every layer" in said
    assert "Residual stream entering the block." in said


def test_sites__of_a_folder_without_weights__needs_only_its_config(model, capsys, tmp_path):
    shutil.copy(f"{model}/config.json", tmp_path)
    assert main(["sites", str(tmp_path)]) == 0
    assert "8 pos × 2 head × 8 d_head in every layer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "more", "message"),
    [
        (
            {"corrupt": CORRUPT.replace(" a ", " ")},
            [],
            r"PairingError: clean has 15 tokens.*\| gave \| ring \| to",
        ),
        ({"answer": "Mary John"}, [], r"TokenError: ` Mary John` is 2 tokens, not one: `Mary` `John`"),
        ({"clean": CLEAN.replace("store", "Zarathustra")}, [], r"TokenError: `Zarathustra` \(word 8"),
        ({}, ["--site", "resid_prä"], r"SiteError: no site `resid_prä` here.*Did you mean `resid_pre`"),
        ({}, ["--over", "layer", "heads"], r"SiteError: cannot sweep `heads`"),
        ({}, ["--page", "/dev/null/page.html"], r"WriteError: cannot write the page"),
    ],
)
def test_patch__of_what_cannot_be__prints_the_error_and_exits_2(model, capsys, changes, more, message):
    assert _patch(model, *more, **changes) == 2
    captured = capsys.readouterr()
    assert re.search(message, captured.err, re.DOTALL)
    assert "Traceback" not in captured.err


def test_patch__of_a_model_that_is_not_there__exits_2(capsys):
    assert _patch("/no/such/folder") == 2
    assert "CheckpointError: `/no/such/folder` is neither" in capsys.readouterr().err


def test_patch__of_a_model_without_tokenizer__exits_2(model, capsys, tmp_path):
    decoder, _ = mj.load(model)
    folder = export(decoder, tmp_path / "mute", family="gpt2")
    assert _patch(str(folder)) == 2
    assert re.search(r"ArgumentError: `.*mute` has no tokenizer.json", capsys.readouterr().err, re.DOTALL)


def test_tour__with_a_page_that_cannot_be_written__exits_2(capsys, tmp_path):
    assert main(["tour", "--page", str(tmp_path)]) == 2
    assert "WriteError: cannot write the page" in capsys.readouterr().err


@pytest.mark.slow
def test_tour__of_few_sentences__prints_heads_and_where_the_page_is(capsys, tmp_path):
    assert main(["tour", "--page", str(tmp_path / "t.html"), "--n", "8"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"L\d\.H\d brings back \d+% by itself", said)
    assert "Without these three heads" in said
    assert "t.html" in said.replace("\n", "")


def test_main__without_a_verb_or_with_a_wrong_option__exits_2(capsys):
    for argv in ([], ["fly"], ["tour", "--no-such"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_main__help__exits_0(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert "tour" in capsys.readouterr().out


def test_main__interrupted__exits_130(monkeypatch, capsys):
    def interrupted(model: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(__import__("mechjax.cli.main", fromlist=["VERBS"]).VERBS, "sites", interrupted)
    assert main(["sites", "--model", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err
