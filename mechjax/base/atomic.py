"""Files and folders that appear whole or not at all, whenever the process or the machine stops.

What is new is written beside its place, brought to disk, and then given its name in one step; the folder that holds the
name is brought to disk last. A leftover of who was killed begins with a dot and is part of nothing.
"""

import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

_CANNOT = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EACCES, errno.EBADF, errno.EPERM}
_CURRENT_FOLDER, _SWAP = -100, 2  # AT_FDCWD, and RENAME_EXCHANGE of Linux or RENAME_SWAP of macOS


def replace_file(path: Path, data: bytes) -> None:
    """Put `data` at `path` in one step, on disk before it has its name: whoever reads finds all of it or none.

    A file that is there keeps its permissions; a new one has those that the umask leaves.
    """
    fresh = path.with_name(f".saving-{uuid4().hex}")
    try:
        with fresh.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileNotFoundError):
            shutil.copymode(path, fresh)
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


@contextmanager
def replace_folder(folder: Path) -> Generator[Path, None, None]:
    """A new folder to fill, which takes the place of `folder` once all of it is on disk; the folder's parents are made.

    What was there is exchanged for it in one step on Linux and macOS, and removed then. Elsewhere it is renamed first,
    and back where the second step fails.
    """
    fresh = folder.with_name(f".{folder.name}.{uuid4().hex}")
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in fresh.rglob("*"):
            (flush_folder if path.is_dir() else _flush)(path)
        flush_folder(fresh)
        _swap(fresh, folder)
        flush_folder(folder.parent)
    finally:
        if fresh.is_symlink() or fresh.is_file():  # which stood under the folder's name
            fresh.unlink()
        shutil.rmtree(fresh, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Have the names in `folder` on disk, where the system can do that."""
    if os.name == "nt":
        return
    try:
        _flush(folder)
    except OSError as error:  # some network file systems know no such thing
        if error.errno not in _CANNOT:
            raise


def _flush(path: Path) -> None:
    handle = os.open(
        path, os.O_RDWR if os.name == "nt" else os.O_RDONLY
    )  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap(fresh: Path, folder: Path) -> None:
    """Have `fresh` take the name `folder`; what was there is under the name `fresh` then, or gone."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if os.name == "nt" and folder.exists():
            folder.rmdir()
        os.replace(fresh, folder)
        return
    if _exchange(fresh, folder):
        return
    stale = folder.with_name(f".{folder.name}.{uuid4().hex}")
    os.replace(folder, stale)
    try:
        os.replace(fresh, folder)
    except OSError:
        os.replace(stale, folder)
        raise
    shutil.rmtree(stale, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Have two names change places in one step; False where the system cannot.

    Raises:
        OSError: It can, and did not.
    """
    name = {"linux": "renameat2", "darwin": "renamex_np"}.get(sys.platform)
    call = getattr(ctypes.CDLL(None, use_errno=True), name, None) if name else None
    if call is None:
        return False
    paths = [os.fsencode(one), os.fsencode(other)]
    at = [_CURRENT_FOLDER] if name == "renameat2" else []
    words = [part for path in paths for part in (*at, path)]
    if call(*words, _SWAP) == 0:
        return True
    if (code := ctypes.get_errno()) in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))
