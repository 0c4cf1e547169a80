"""Reading: what is a document, from any place on, and bad input named by file and line."""

import json
from pathlib import Path

import pytest

from mechjax.base.errors import ArgumentError, CheckpointError, TokenError
from mechjax.text import documents

pytestmark = pytest.mark.usefixtures("as_a_user")


def _write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path):
    """A folder of three files; what is no text file is left out."""
    _write(tmp_path / "a.jsonl", '{"text": "one"}', "", '{"text": "two ü", "n": 1}', '{"text": "th\\nree"}')
    _write(tmp_path / "b.txt", "\ufefffour", "still four")
    _write(tmp_path / "c.ndjson", b'{"text": "five"}')
    _write(tmp_path / "README.md", "no")
    return tmp_path


def test_documents__folder__gives_every_text_in_order(corpus):
    assert list(documents(corpus)) == ["one", "two ü", "th\nree", "four\nstill four\n", "five"]
    assert list(documents(str(corpus / "c.ndjson"))) == ["five"]
    assert list(documents([corpus / "c.ndjson", corpus / "a.jsonl"]))[:2] == ["five", "one"]
    assert list(documents(corpus / "b.txt", per="line")) == ["four", "still four"]


@pytest.mark.parametrize("per", ["file", "line"])
def test_documents__read_from_any_cursor__goes_on_behind_it(corpus, per):
    source = documents(corpus, per=per)
    read = list(source.read())
    for i, (_, cursor) in enumerate(read):
        rest = [document for document, _ in source.read(json.loads(json.dumps(cursor)))]
        assert rest == [document for document, _ in read[i + 1 :]]
    assert [document.number for document, _ in read] == list(range(len(read)))


def test_documents__strings__are_texts_and_iterators_are_read_once():
    assert list(documents(["a", "b"])) == ["a", "b"]
    once = documents(text for text in ("a", "b"))
    assert list(once) == ["a", "b"]
    with pytest.raises(ArgumentError, match="can be read only once"):
        list(once)


def test_documents__empty_text__raises_or_is_left_out(tmp_path):
    with pytest.raises(TokenError, match=r"document 1 is empty.*empty='skip'"):
        list(documents(["a", " \n"]))
    assert list(documents(["a", " \n", "b"], empty="skip")) == ["a", "b"]
    _write(tmp_path / "e.jsonl", '{"text": "a"}', '{"text": ""}')
    with pytest.raises(TokenError, match=r"line 2 of `.*e.jsonl` is empty"):
        list(documents(tmp_path))
    _write(tmp_path / "z.txt")
    with pytest.raises(TokenError, match=r"z.txt` is empty"):
        list(documents(tmp_path / "z.txt"))


@pytest.mark.parametrize(("name", "per"), [("x.txt", "file"), ("x.txt", "line"), ("x.jsonl", "file")])
def test_documents__undecodable_bytes__names_file_and_line(tmp_path, name, per):
    good = '{"text": "fine"}'
    path = _write(tmp_path / name, good, good, b'{"text": "caf\xe9"}\n')
    with pytest.raises(TokenError, match=r"line 3 of `.*x\..*` is no UTF-8: byte 0xe9"):
        list(documents(path, per=per))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"txt": "a"}', r"line 2 of `.*` has no field `text`; it has `txt`. Did you mean `txt`"),
        ('{"text": 3}', r"`text` in line 2 of `.*` is 3; it must be a string"),
        ('["a"]', r"line 2 of `.*` is a JSON list"),
        ("{", r"line 2 of `.*` is no JSON"),
    ],
)
def test_documents__bad_json__names_the_line(tmp_path, line, message):
    with pytest.raises(TokenError, match=message):
        list(documents(_write(tmp_path / "x.jsonl", '{"text": "a"}', line)))


def test_documents__source_that_is_none__is_refused(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"there is no file `nowhere.txt`.*a list: \[text\]"):
        documents("nowhere.txt")
    with pytest.raises(CheckpointError, match=r"has no .jsonl, .ndjson or .txt file"):
        documents(tmp_path)
    with pytest.raises(ArgumentError, match="takes a path, paths or an iterable of strings, got int"):
        documents(3)
    with pytest.raises(ArgumentError, match="per is 'file' or 'line'"):
        documents(["a"], per="word")
    with pytest.raises(TokenError, match="document 0 is a bytes"):
        list(documents([b"a"]))
    monkeypatch.chdir(tmp_path)
    _write(Path("x.txt"), "a")
    with pytest.raises(ArgumentError, match=r"the first, 'x.txt', is also a file"):
        documents(["x.txt"])
