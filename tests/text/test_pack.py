"""Packing: no token lost or doubled, boundaries where documents end, resumed equals uninterrupted."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from numpy.testing import assert_array_equal
from tokenizers import models, normalizers, pre_tokenizers

from mechjax.base.errors import ArgumentError, TokenError
from mechjax.hub import Tokenizer
from mechjax.text import documents, pack
from tests.hub.test_tokenizer import words
from tests.text.bytewise import BOS, EOS, PAD, bytewise

ROOT = Path(__file__).parents[2]
TEXTS = st.lists(st.text("abü \n", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=12)
SIZES = {"length": st.integers(1, 9), "batch": st.integers(1, 4), "buffer": st.integers(1, 7),
         "seed": st.none() | st.integers(0, 99), "epochs": st.integers(1, 2), "restart_positions": st.booleans()}  # fmt: skip
FEW = settings(max_examples=40, deadline=None)


def _stream(batches, name):
    """One field of all batches, real tokens only, in order."""
    rows = [np.asarray(getattr(b, name))[np.asarray(b.mask)] for b in batches]
    return np.concatenate(rows) if rows else np.zeros(0, int)


def _ids(text, bos=True):
    return [BOS] * bos + bytewise(bos=False).backend.encode(text).ids


@FEW
@given(texts=TEXTS, how=st.fixed_dictionaries(SIZES))
def test_pack__an_epoch__has_every_token_of_every_document_once(texts, how):
    batches = list(pack(texts, bytewise(), **how))
    tokens, numbers = _stream(batches, "tokens"), _stream(batches, "document")
    n = len(tokens) // how["epochs"]
    for epoch in range(how["epochs"]):
        part = slice(epoch * n, (epoch + 1) * n)
        starts = np.flatnonzero(tokens[part] == BOS)  # every document whole, in one piece
        found = dict(zip(numbers[part][starts].tolist(), np.split(tokens[part], starts[1:]), strict=True))
        assert sorted(found) == list(range(len(texts)))
        assert all(found[i].tolist() == _ids(text) for i, text in enumerate(texts))
    if how["seed"] is None:
        assert_array_equal(tokens[:n], np.concatenate([_ids(text) for text in texts]))
    assert all(b.tokens.shape == (how["batch"], how["length"]) for b in batches)
    assert all(b.mask.all() for b in batches[:-1])
    assert not np.diff(np.asarray(batches[-1].mask).ravel().astype(int)).max(
        initial=0
    )  # padding ends the batch


@FEW
@given(texts=TEXTS, how=st.fixed_dictionaries(SIZES))
def test_pack__segments_and_positions__begin_where_documents_do(texts, how):
    for batch in pack(texts, bytewise(), **how):
        fields = (batch.tokens, batch.mask, batch.document, batch.segment, batch.positions)
        for tokens, mask, document, segments, positions in zip(*map(np.asarray, fields), strict=True):  # rows
            segment, seen = 0, 0
            for column in range(how["length"]):
                if not mask[column]:
                    assert (tokens[column], document[column], segments[column]) == (PAD, -1, 0)
                    continue
                begins = column == 0 or tokens[column] == BOS
                segment, seen = segment + begins, 0 if begins else seen + 1
                assert segments[column] == segment
                assert positions[column] == (seen if how["restart_positions"] else column)


@FEW
@given(texts=TEXTS, how=st.fixed_dictionaries(SIZES), data=st.data())
def test_pack__resumed_at_any_batch__equals_uninterrupted(texts, how, data):
    make = lambda: pack(texts, bytewise(), **how)
    whole = list(make())
    stop = data.draw(st.integers(0, len(whole)))
    first = make()
    for _ in range(stop):
        next(first)
    rest = list(make().restore(json.loads(json.dumps(first.state()))))
    assert len(rest) == len(whole) - stop
    for resumed, expected in zip(rest, whole[stop:], strict=True):
        for name in ("tokens", "mask", "document", "segment", "positions"):
            assert_array_equal(getattr(resumed, name), getattr(expected, name))


def test_pack__shuffle__differs_by_seed_and_epoch_and_stays_in_its_window():
    texts = [chr(97 + i) for i in range(20)]
    order = lambda **how: _stream(pack(texts, bytewise(), length=2, batch=5, **how), "document")[::2]
    twice = order(seed=1, epochs=2, buffer=10)
    assert twice[:20].tolist() != twice[20:].tolist() != order(seed=2, buffer=10).tolist()
    assert_array_equal(twice[:20], order(seed=1, buffer=10))
    assert Counter(twice[:10].tolist()) == Counter(range(10)) and twice[:10].tolist() != list(range(10))


@pytest.mark.parametrize(
    ("own", "bos", "eos", "expected"),
    [
        (True, None, False, [BOS, 64]), (True, True, False, [BOS, 64]), (True, False, False, [64]),
        (False, None, False, [64]), (False, True, True, [BOS, 64, EOS]), (True, False, True, [64, EOS]),
    ],
)  # fmt: skip
def test_pack__bos_and_eos__stand_as_the_checkpoint_has_it_or_as_asked(own, bos, eos, expected):
    tokenizer = bytewise(bos=own)
    letter = tokenizer.backend.encode("a", add_special_tokens=False).ids[0]
    expected = [letter if token == 64 else token for token in expected]
    batches = pack(["a", "a"], tokenizer, length=3, batch=1, bos=bos, eos=eos)
    assert _stream(batches, "tokens").tolist() == 2 * expected


def test_pack__reading__never_holds_more_than_a_window():
    read = []

    def endless():
        while True:
            read.append(None)
            yield "abc"

    packing = pack(endless(), bytewise(), length=4, batch=2, buffer=3)
    for n in range(1, 20):  # a batch is two documents
        next(packing)
        assert len(read) <= 2 * n + 3


def test_pack__prompts__go_where_prompts_go():
    batch = next(pack(["abc"], bytewise(), length=6, batch=1))
    assert batch.prompts.lengths.tolist() == [4]
    assert bytewise().decode(batch.prompts) == ["<bos>abc"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("to the zoo", r"document 1 cannot be tokenized. `zoo`"),
        ("to\ud800", r"document 1 cannot .* no valid Unicode"),
    ],
)
def test_pack__text_without_tokens__is_named_and_the_position_stays(as_a_user, bad, message):
    backend = tokenizers.Tokenizer(models.WordLevel({"Mary": 0, "went": 1, "to": 2, "the": 3}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    packing = pack(["Mary went", bad], Tokenizer(backend), length=2, batch=1, seed=None, buffer=1)
    next(packing)
    state = packing.state()
    for _ in range(2):
        with pytest.raises(TokenError, match=message):
            next(packing)
        assert packing.state() == state


@pytest.mark.parametrize("epochs", [1, None])
def test_pack__nothing_to_give__is_said(epochs):
    with pytest.raises(TokenError, match="there are no documents"):
        next(pack([], bytewise(), length=2, batch=1, epochs=epochs))
    deaf = bytewise(bos=False)
    deaf.backend.normalizer = normalizers.Replace("a", "")
    with pytest.raises(TokenError, match="none that has a token"):
        next(pack(["a", "aa"], deaf, length=2, batch=1, epochs=epochs))


def test_pack__wrong_sizes_and_tokens__are_refused(as_a_user):
    with pytest.raises(ArgumentError, match="length=0; it must be 1 or more"):
        pack(["a"], bytewise(), length=0, batch=1)
    with pytest.raises(ArgumentError, match="seed=-1; it must be 0 or more"):
        pack(["a"], bytewise(), length=1, batch=1, seed=-1)
    with pytest.raises(ArgumentError, match="eos=True, but this checkpoint names no EOS token"):
        pack(["a"], Tokenizer(words()), length=1, batch=1, eos=True)


def test_pack__state_of_something_else__is_refused(as_a_user, tmp_path):
    state = pack(["a", "b"], bytewise(), length=2, batch=1).state()
    for other, message in [
        (pack(["a", "b"], bytewise(), length=2, batch=3), r"saved with batch=1 \(now 3\)"),
        (pack(["a"], bytewise(), length=2, batch=1), r"another documents \(2, now 1\)"),
        (pack(["a", "b"], bytewise(bos=False), length=2, batch=1), "another tokenizer"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            other.restore(state)
    with pytest.raises(ArgumentError, match=r"restore takes what `state\(\)` gave"):
        pack(["a"], bytewise(), length=2, batch=1).restore({"epoch": 1})


_CHILD = """
import json, os, sys
from tests.text.bytewise import bytewise
from mechjax.text import documents, pack
corpus, log, saved = sys.argv[1:]
packing = pack(documents(corpus), bytewise(), length=16, batch=4, seed=5, buffer=8, epochs=None)
if os.path.exists(saved):
    packing.restore(json.load(open(saved)))
for batch in packing:
    with open(log, "a") as lines:
        lines.write(json.dumps([packing.state()["position"]["batches"], batch.tokens.tolist()]) + "\\n")
    with open(saved + ".new", "w") as file:
        json.dump(packing.state(), file)
    os.replace(saved + ".new", saved)
"""


def test_pack__process_killed_again_and_again__goes_on_with_the_next_batch(tmp_path):
    corpus, log, saved = (tmp_path / name for name in ("corpus.jsonl", "log", "state.json"))
    corpus.write_text("".join(json.dumps({"text": f"document {i} " * (i % 7 + 1)}) + "\n" for i in range(50)))
    for moment in (0.05, 0.2):
        had = log.stat().st_size if log.exists() else 0
        child = subprocess.Popen([sys.executable, "-c", _CHILD, corpus, log, saved], cwd=ROOT)
        try:
            for _ in range(1200):  # until it writes, then a moment more
                if (log.stat().st_size if log.exists() else 0) > had or child.poll() is not None:
                    break
                time.sleep(0.05)
            time.sleep(moment)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
    entries = {}
    for line in log.read_text().splitlines():
        try:
            number, tokens = json.loads(line)
        except ValueError:  # the line that was being written
            continue
        assert (
            entries.setdefault(number, tokens) == tokens
        )  # given again only if it was killed before it saved
    whole = pack(documents(corpus), bytewise(), length=16, batch=4, seed=5, buffer=8, epochs=None)
    assert len(entries) > 1
    for number, batch in zip(range(1, len(entries) + 1), whole, strict=False):
        assert entries[number] == batch.tokens.tolist()
