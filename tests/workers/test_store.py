"""Stores: writes that happen only where nobody wrote, by paths and URLs; what workers must agree on."""

import json

import pytest

from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.workers import KINDS, opened
from mechjax.workers.agree import agree

PAGE = {"format": "a sweep", "site": "z", "over": ["layer", "head"], "n": 3}


def test_write__over_what_was_read__happens_once(tmp_path):
    store = opened(tmp_path / "new")
    missing = store.read("a/b")
    assert missing.value is None and "a/b" not in store and store.names() == []
    first = store.write("a/b", b"1", over=missing)
    assert store.write("a/b", b"2", over=missing) is None
    assert store.read("a/b") == first and "a/b" in store
    assert store.write("a/b", b"1", over=missing) == first  # its own, sent twice
    second = store.write("a/b", b"3", over=first)
    assert store.write("a/b", None, over=first) is None
    assert store.write("a/b", None, over=second) is not None
    assert store.names() == [] and store.read("a/b").value is None


def test_within__a_name__holds_keys_of_its_own(tmp_path):
    store = opened(f"file://{tmp_path}/new")
    store.within("part-0").write("unit-1", b"x")
    store.within("part-01").write("unit-2", b"y")
    assert store.names() == ["part-0/unit-1", "part-01/unit-2"]
    assert store.within("part-0").names() == ["unit-1"] and store.names("part-01/") == ["unit-2"]
    assert (tmp_path / "new" / "part-0" / "unit-1").read_bytes() == b"x"
    assert store.within("part-0").path("unit-1") == f"file://{tmp_path}/new/part-0/unit-1"


def test_opened__of_every_kind__says_what_it_promises():
    assert (
        opened("gs://bucket-of-mine/sweep").kind.leases and not opened("gs://bucket-of-mine/sweep").kind.tried
    )
    assert not opened("s3://bucket-of-mine/sweep").kind.leases
    assert all(kind.promise.endswith(".") for kind in KINDS.values())
    with pytest.raises(
        ArgumentError, match=r"`ftp://` is not known. Give a folder, or a URL that begins with `file"
    ):
        opened("ftp://machine/sweep")
    with pytest.raises(ArgumentError, match="Did you mean `gs`"):
        opened("gcs://bucket/sweep")


def test_store__of_a_file_in_place_of_a_folder__says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    store = opened(tmp_path / "file" / "sweep")
    with pytest.raises(WriteError, match=r"cannot write .*Not a directory.*Choose a folder"):
        store.write("a", b"1")
    with pytest.raises(CheckpointError, match=r"cannot read .*Not a directory"):
        store.names()
    with pytest.raises(WriteError, match="Choose a folder"):
        agree(store, PAGE, units="unit-")


def test_agree__of_workers_that_do_not__names_what_differs(tmp_path, monkeypatch):
    store = opened(tmp_path / "sweep")
    digest = agree(store, PAGE, units="unit-")
    assert agree(store, dict(reversed(PAGE.items())), units="unit-") == digest
    with pytest.raises(
        ArgumentError, match='holds another sweep: `site` is "z" there and "q" here; `n` is 3 there'
    ):
        agree(store, PAGE | {"site": "q", "n": 4}, units="unit-")
    with pytest.raises(ArgumentError, match="`seed` is null there and 1 here"):
        agree(store, PAGE | {"seed": 1}, units="unit-")
    read, missing = type(store).read, [opened(tmp_path / "none").read("sweep.json")]
    monkeypatch.setattr(type(store), "read", lambda self, key: missing.pop() if missing else read(self, key))
    with pytest.raises(ArgumentError, match='`site` is "z" there and "q" here'):  # others wrote in between
        agree(store, PAGE | {"site": "q"}, units="unit-")


@pytest.mark.parametrize("page", [b"{", b"[1]", json.dumps(PAGE | {"sha256": "0"}).encode()])
def test_agree__with_what_was_changed__refuses(tmp_path, page):
    store = opened(tmp_path)
    store.write("sweep.json", page)
    with pytest.raises(CheckpointError, match="not whole, or was changed: its checksum differs"):
        agree(store, PAGE, units="unit-")


def test_agree__about_units_without_a_specification__refuses(tmp_path):
    store = opened(tmp_path)
    store.write("unit-000001.safetensors", b"")
    with pytest.raises(CheckpointError, match=r"holds units, but no `sweep.json`"):
        agree(store, PAGE, units="unit-")
