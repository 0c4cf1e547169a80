"""What to say when a process of several is ended by the death of another.

JAX ends those that are left by SIGABRT, some time after a peer is gone (`heartbeat_timeout_seconds` of
`jax.distributed.initialize`, 100 by default): mostly no exception is raised and no handler runs. So a small process of
its own waits beside each, and says what there is to say when the other end of its pipe is closed without a word.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

_FAREWELL = b"."
_WATCHER = """
import os, signal, sys
for name in ("SIGINT", "SIGTERM"):
    signal.signal(getattr(signal, name), signal.SIG_IGN)
if sys.stdin.buffer.read() != b".":
    os.write(2, (sys.argv[1] + "\\n").encode())
"""


@contextmanager
def last_words(said: str) -> Iterator[None]:
    """Where several processes run one program, have `said` written to stderr if this one is ended inside.

    Args:
        said: What was kept, and how to go on. An exception speaks for itself; one of JAX's has it added as a note.
    """
    if jax.process_count() == 1:
        yield
        return
    words = (
        f"Process {jax.process_index()} of {jax.process_count()} was ended, as happens some time after another of the "
        f"run has died. {said}"
    )
    watcher = subprocess.Popen(
        [sys.executable, "-S", "-c", _WATCHER, words], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        yield
    except jax.errors.JaxRuntimeError as error:  # on CPU a sum fails at once when a peer is gone
        error.add_note(f"Where another process of the run has died: {said}")
        raise
    finally:
        watcher.communicate(_FAREWELL)
