"""Files and folders that appear whole: their permissions, what is left behind, and systems that can do less."""

import errno
import os
import stat

import pytest

from mechjax.base import atomic
from mechjax.base.atomic import flush_folder, replace_file, replace_folder

WINDOWS = pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")


@pytest.fixture
def umask():
    old = os.umask(0o027)
    yield
    os.umask(old)


@WINDOWS
def test_replace_file__new__has_what_the_umask_leaves(tmp_path, umask):
    replace_file(tmp_path / "x", b"1")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@WINDOWS
def test_replace_file__over_another__keeps_its_permissions(tmp_path):
    (tmp_path / "x").write_text("old")
    (tmp_path / "x").chmod(0o604)
    replace_file(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o604


def test_replace_file__that_fails__leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("old")

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(tmp_path / "x", b"new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


def test_replace_file__brings_file_and_folder_to_disk_in_order(tmp_path, monkeypatch):
    said, fsync, replace = [], os.fsync, os.replace
    kind = lambda handle: "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
    monkeypatch.setattr(atomic.os, "fsync", lambda handle: (said.append(kind(handle)), fsync(handle)))
    monkeypatch.setattr(atomic.os, "replace", lambda a, b: (said.append("rename"), replace(a, b)))
    replace_file(tmp_path / "x", b"1")
    assert said == ["file", "rename", "folder"]


@pytest.mark.parametrize(("code", "raises"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_flush_folder__where_the_system_cannot__goes_on_and_where_the_disk_fails__says_so(
    tmp_path, monkeypatch, code, raises
):
    def fails(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(atomic.os, "fsync", fails)
    if raises:
        with pytest.raises(OSError, match=os.strerror(code)):
            flush_folder(tmp_path)
    else:
        flush_folder(tmp_path)


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replace_folder__over_another__replaces_all_of_it(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").write_text("old")
    with replace_folder(folder) as fresh:
        (fresh / "new").write_text("new")
        assert [p.name for p in folder.iterdir()] == ["old"]
    assert [p.name for p in folder.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_replace_folder__that_fails__leaves_the_old_one_alone(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").write_text("old")
    with pytest.raises(FileNotFoundError), replace_folder(folder) as fresh:
        (fresh / "no folder" / "new").write_text("new")
    assert [p.name for p in folder.iterdir()] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_exchange__of_what_is_not_there__is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    if atomic._exchange(tmp_path / "a", tmp_path / "a") is False:
        pytest.skip("this file system exchanges no names")
    with pytest.raises(OSError, match="No such file"):
        atomic._exchange(tmp_path / "a", tmp_path / "none")


@pytest.mark.parametrize("kind", ["file", "link"])
def test_replace_folder__where_a_file_or_link_stands__takes_its_place(tmp_path, kind):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").write_text("kept")
    if kind == "file":
        (tmp_path / "a").write_text("old")
    else:
        (tmp_path / "a").symlink_to(tmp_path / "there")
    with replace_folder(tmp_path / "a") as fresh:
        (fresh / "new").write_text("new")
    assert (tmp_path / "a" / "new").read_text() == "new" and not (tmp_path / "a").is_symlink()
    assert (tmp_path / "there" / "x").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "there"]
