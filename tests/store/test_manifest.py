"""The manifest: what is no store, or of the future, or was changed, is refused; names in it are only names."""

import copy
import hashlib
import json
import shutil
from contextlib import suppress

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import mechjax as mj
from mechjax.base.errors import CheckpointError, MechjaxError
from mechjax.store.manifest import NAME, read_manifest, write_manifest
from tests.store import small


def signed(page):
    """The page with a right checksum, as somebody who means harm would write it."""
    page = {name: value for name, value in page.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()
    return json.dumps({**page, "sha256": digest})


@pytest.fixture
def page(copied):
    return json.loads((copied / NAME).read_text())


def test_manifest__written_and_read__is_the_same(whole, tmp_path):
    manifest = whole[1].manifest
    write_manifest(tmp_path, manifest)
    found = read_manifest(tmp_path)
    assert found.specification == manifest.specification and found.shards == manifest.shards
    for a, b in zip(found.moments, manifest.moments, strict=True):
        np.testing.assert_array_equal(a.mean, b.mean)
        np.testing.assert_array_equal(a.squares, b.squares)


def test_read__of_what_is_no_store__says_so(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(
            CheckpointError, match=r"is no store of activations: it has no `manifest.json`\. Give"
        ):
            mj.store.read(folder)
    (tmp_path / NAME).write_text('{"format": "another", "version": 1}')
    with pytest.raises(CheckpointError, match="not that of a store of activations: `format` is not"):
        mj.store.read(tmp_path)


def test_read__of_a_version_from_the_future__says_so(copied, page):
    (copied / NAME).write_text(signed({**page, "version": 2}))
    with pytest.raises(
        CheckpointError, match=r"is a store of version 2, and this mechjax reads version 1: read it"
    ):
        mj.store.read(copied)


def test_read__of_a_changed_or_cut_manifest__is_refused(copied, page):
    text = (copied / NAME).read_text()
    (copied / NAME).write_text(text.replace('"rows": 50', '"rows": 49', 1))
    with pytest.raises(CheckpointError, match="was changed after it was written: its checksum differs"):
        mj.store.read(copied)
    for n in range(0, len(text), 997):
        (copied / NAME).write_text(text[:n])
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            mj.store.read(copied)


def test_read__of_a_name_that_would_be_a_path__opens_no_other_file(copied, page, tmp_path):
    """A site's name is only a name: its rows lie where its number says."""
    secret = tmp_path / "secret"
    shutil.copytree(copied / "array-001", secret)
    page["specification"]["columns"][0]["site"] = "../secret"
    (copied / NAME).write_text(signed(page))
    store = mj.store.read(copied)
    rows = store.rows(slice(None), "../secret", layer=0)
    shutil.rmtree(secret)
    np.testing.assert_array_equal(rows, store.rows(slice(None), "../secret", layer=0))


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("specification", "chunk_rows"), 7, "it has 50 rows of float32 in shards, 7 in chunks"),
        (("specification", "dtype"), "object", "rows of object"),
        (("specification", "columns", 0, "width"), 0, "`width` is 0"),
        (("specification", "columns"), [], "in chunks"),
        (("specification", "rows"), True, "`rows` is True"),
        (("shards", 0, "rows"), 49, "its shards are not what its specification says"),
        (("shards", 0, "sha256", 0), "../../etc/passwd", "a shard is not what the specification says"),
        (("shards", 0, "sizes", 0), -1, "a shard is not what"),
        (("shards", 0, "end", "batches"), "2", "`batches` is '2'"),
        (("rows",), 240, "other numbers of rows than it says"),
        (("complete",), False, "its shards are not what"),
        (("moments", 0, "mean"), [0.0], "moments are not as many numbers as a row has"),
        (("moments",), [], "its shards are not what"),
        (("skipped",), -1, "`skipped` is -1"),
    ],
)
def test_read__of_a_manifest_that_contradicts_itself__is_refused(copied, page, place, value, said):
    *way, last = place
    inner = page
    for step in way:
        inner = inner[step]
    inner[last] = value
    (copied / NAME).write_text(signed(page))
    with pytest.raises(CheckpointError, match=f"contradicts itself: .*{said}"):
        mj.store.read(copied)


def leaves(node, place=()):
    """The place of every entry."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in entries:
        yield (*place, name)
        yield from leaves(child, (*place, name))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_read__of_any_manifest_with_a_right_checksum__reads_or_refuses(whole, tmp_path, data):
    page = json.loads((whole[0] / NAME).read_text())
    places = [place for place in leaves(page) if place[0] not in ("format", "version", "sha256")]
    *way, last = data.draw(st.sampled_from(places))
    odd = (
        st.none() | st.booleans() | st.integers(-3, 10**12) | st.text(max_size=4) | st.just([]) | st.just({})
    )
    changed = copy.deepcopy(page)
    inner = changed
    for step in way:
        inner = inner[step]
    if data.draw(st.booleans()) and isinstance(inner, dict):
        del inner[last]
    else:
        inner[last] = data.draw(odd | st.floats(allow_nan=False))
    folder = tmp_path / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in whole[0].glob("array-*"):
        (folder / path.name).symlink_to(path)
    (folder / NAME).write_text(signed(changed))
    with suppress(MechjaxError):
        mj.store.read(folder, partial=True).rows(slice(3), small.SITES[0], layer=0)
