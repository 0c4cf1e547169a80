"""Which process this is, and whether another one is gone: told for processes of one running machine alone.

Numbers of processes are used again, and machines and containers have their own, so a process is named by the boot of
its machine, its namespace, its number and when it began. Where /proc does not tell these, nobody is known to be gone,
and leases expire.
"""

import os
from pathlib import Path

_PROC = Path("/proc")


def this_process() -> str | None:
    """What names this process among all; None where that cannot be told."""
    return _named(os.getpid())


def is_gone(process: str | None) -> bool:
    """Whether a process is known to have ended: True only where that is sure."""
    mine = this_process()
    if process is None or mine is None:
        return False
    *where, number, _ = process.split()
    if where != mine.split()[:2] or not number.isdecimal():
        return False  # of another machine, or of another container
    return _named(int(number)) != process


def _named(number: int) -> str | None:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat(_PROC / "self/ns/pid").st_ino
        # Behind the name, which may hold anything: state, and as the 20th from there when it began, in ticks.
        state, *rest = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else f"{boot} {namespace} {number} {rest[18]}"
