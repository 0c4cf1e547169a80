"""One writer at a time."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mechjax.base.errors import WriteError


@contextmanager
def sole_writer(folder: Path) -> Generator[None, None, None]:
    """Makes the folder, and keeps others from writing to it. Whoever is killed lets go of it.

    Raises:
        WriteError: It cannot be written, or somebody else is writing to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("wb")
    except OSError as error:
        raise WriteError(
            f"cannot write to `{folder}`: {error.strerror or error}. Choose a folder that can be written."
        ) from error
    with file:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WriteError(
                f"`{folder}` is being written to by another process. Wait for it, or choose another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
