"""The shipped model has the heads that its card names, and the script that trained it still runs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.heads import detect_heads, repeated_tokens
from mechjax.models.load import zoo
from mechjax.studies import zoo_induction
from mechjax.studies.zoo_induction import (
    FIRST_WORD,
    REQUIRED,
    Options,
    best,
    card,
    configured,
    row,
    scores,
    train,
)
from mechjax.tasks.vocabulary import vocabulary


@pytest.fixture(scope="module")
def folder() -> Path:
    return zoo()["induction-2l"]


@pytest.fixture(scope="module")
def shipped():
    return mj.load("induction-2l")


def test_shipped__folder__is_small_and_whole(folder: Path, shipped):
    model, tokenizer = shipped
    assert (folder / "model.safetensors").stat().st_size < 2_000_000
    assert model.config == configured(len(vocabulary()))
    assert model.blocks.mlp is None
    ids = tokenizer.backend.get_vocab()
    assert tuple(sorted(ids, key=lambda word: ids[word])) == vocabulary()


def test_shipped__heads__score_above_what_is_required_on_words_of_another_draw(shipped):
    model, tokenizer = shipped
    words = range(FIRST_WORD, model.config.d_vocab)
    prompts = repeated_tokens(
        model, key=jax.random.key(7), n=32, period=20, bos=tokenizer.special_id("bos_token"), ids=words
    )
    found = detect_heads(model, prompts)
    named = found.heads(0.8)
    assert named["previous_token"] and all(name.startswith("L0.") for name in named["previous_token"])
    assert named["induction"] and all(name.startswith("L1.") for name in named["induction"])
    assert not named["duplicate_token"]
    logits = model(prompts)
    second = slice(21, 40)  # words of the second time, each known from the first
    right = logits[:, second].argmax(-1) == prompts.tokens[:, 22:]
    assert float(right.mean()) > 0.95


def test_shipped__without_its_previous_token_heads__has_no_induction_heads(shipped):
    model, tokenizer = shipped
    words = range(FIRST_WORD, model.config.d_vocab)
    bos = tokenizer.special_id("bos_token")
    prompts = repeated_tokens(model, key=jax.random.key(8), n=8, period=20, bos=bos, ids=words)
    table = np.asarray(detect_heads(model, prompts).scores)
    before = [int(head) for head in np.flatnonzero(table[0, 0] > 0.1)]
    cut = mj.intervene(model, mj.zero("z", layer=0, head=before))
    pattern = mj.capture(cut, "pattern")(prompts)[1]["pattern"][1]
    at = np.arange(21, 41)
    assert np.asarray(pattern)[:, :, at, at - 19].mean((0, 2)).max() < 0.2 < table[2, 1].max()


def test_card__its_numbers__are_those_that_were_measured(folder: Path, shipped):
    model, tokenizer = shipped
    measured, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    again = scores(model, tokenizer.special_id("bos_token"))
    for kind, found in measured["scores"].items():
        assert_allclose(again[kind], found, rtol=0.01, atol=0.01)
    for kind, least in REQUIRED.items():
        name, score = best(measured, kind)
        assert score > least
        assert f"| {kind} | {name} {score:.2f} |" in text
    assert f"{measured['parameters']:,} parameters" in text
    assert measured["seconds"] < 20 * 60


def test_rows__repeated_words__follow_from_what_stands_before():
    rng, total = np.random.default_rng(0), 0
    for _ in range(200):
        tokens, repeated = row(rng, 1000, bos=1)
        assert tokens.shape == repeated.shape == (zoo_induction.LENGTH,)
        assert tokens[0] == 1 and tokens[1:].min() >= FIRST_WORD
        foretold = [
            any(tokens[j] == tokens[i - 1] and tokens[j + 1] == tokens[i] for j in range(i - 1))
            for i in np.flatnonzero(repeated)
        ]
        total += len(foretold)
        assert all(foretold[1:])  # in rows without gaps, nothing foretells where the first repetition begins
    assert total > 200 * 20


@pytest.mark.slow
def test_script__two_steps__leave_a_model_that_loads_and_its_card(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo_induction, "BATCH", 2)
    # As from the command line, where nobody has made JAX strict about dtypes.
    with jax.numpy_dtype_promotion("standard"):
        measured = train(Options(tmp_path / "run", seed=3, steps=2))
    model, tokenizer = mj.load(tmp_path / "run")
    assert tokenizer.vocab_size == measured["vocabulary"] == model.config.d_vocab
    assert model.config.n_params == measured["parameters"]
    text = card(measured, [measured | {"seed": 4}])
    assert "2 seeds (3, 4)" in text.replace("\n", " ")
    assert all(f"| {kind} | " in text for kind in measured["scores"])
