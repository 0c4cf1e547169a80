"""Which unit a worker does next, and what becomes of it: by leases, or by numbers.

Beside the units lie `failed/<unit>.json`, of a unit that was tried three times, and `quarantine/`, of results that
differ from what was there first.
"""

import hashlib
import json
import time
import traceback
import warnings
from collections.abc import Sequence

from mechjax.workers.lease import LEASES, Leases
from mechjax.workers.sharing import Sharing
from mechjax.workers.store import Store

ATTEMPTS = 3
DONE, WAIT, ENDED = -1, -2, -3
FAILED, QUARANTINE = "failed/", "quarantine/"
_POLL = 1.0  # seconds, at most, until a worker with nothing to do looks again


class Leased:
    """Turns by leases.

    Attributes:
        quarantined: Units that this worker found other bytes for than were there.
    """

    def __init__(self, store: Store, names: Sequence[str], sharing: Sharing, leases: Leases) -> None:
        self.store, self.names, self.sharing, self.leases = store, names, sharing, leases
        self.quarantined: list[str] = []
        self._todo = left(store, names)
        self._at, self._attempt = DONE, 0

    def next(self) -> int:
        """The number of a unit that is to be done now; `WAIT` where others are at all that are left, or `DONE`."""
        for index in list(self._todo):
            name = self.names[index]
            if index not in self._todo or (lease := self.leases.claim(name)) is None:
                continue
            if name in self.store or f"{FAILED}{name}.json" in self.store:  # since it was looked for
                self.leases.drop()
                self._todo = left(self.store, self.names)
                continue
            if lease.attempt > ATTEMPTS:
                _set_aside(self.store, name, ATTEMPTS, lease.error or "it was never finished", "")
                self.leases.drop()
                self._todo.remove(index)
                continue
            self._at, self._attempt = index, lease.attempt
            return index
        self._todo = left(self.store, self.names)
        if self._todo:
            return WAIT
        for name in self.store.names(LEASES):  # of workers that died after they had published
            self.store.write(LEASES + name, None)
        return DONE

    def settled(self) -> tuple[int, int]:
        """How many units are done or set aside, as far as is known, and of how many."""
        return len(self.names) - len(self._todo), len(self.names)

    def rest(self) -> None:
        """Wait a little."""
        time.sleep(min(_POLL, self.sharing.expiry / 4))

    def publish(self, data: bytes) -> bool:
        """Keep the result of the unit that is being done; whether it was the first."""
        first = _publish(self, self.names[self._at], data)
        self.leases.drop()
        self._todo.remove(self._at)
        return first

    def failed(self, error: Exception) -> None:
        """The unit that is being done raised."""
        self._todo.remove(self._at)
        if self._attempt < ATTEMPTS:
            self.leases.failed(f"{type(error).__name__}: {error}")
            self._todo.append(self._at)  # others first: what failed for want of memory may have it later
            return
        _set_aside(self.store, self.names[self._at], self._attempt, *_said(error))
        self.leases.drop()

    def give_back(self) -> None:
        """The worker ends before the unit is done."""
        self.leases.give_back()


class Allotted:
    """Turns by numbers: the units whose number plus `shift` is this worker's, modulo the number of workers."""

    def __init__(self, store: Store, names: Sequence[str], sharing: Sharing, shift: int) -> None:
        self.store, self.names = store, names
        self.quarantined: list[str] = []
        worker, of = sharing.worker or 0, sharing.of or 1
        own = range((worker - shift) % of, len(names), of)
        self._todo = [i for i in left(store, names) if i in own]
        self._n, self._attempts = len(own), dict.fromkeys(own, 0)

    def next(self) -> int:
        """The number of a unit that is to be done now, or `DONE`."""
        return self._todo[0] if self._todo else DONE

    def settled(self) -> tuple[int, int]:
        """How many of this worker's units are done or set aside, and of how many."""
        return self._n - len(self._todo), self._n

    def rest(self) -> None:
        """There is nothing to wait for."""

    def publish(self, data: bytes) -> bool:
        """Keep the result of the unit that is being done; whether it was the first."""
        return _publish(self, self.names[self._todo.pop(0)], data)

    def failed(self, error: Exception) -> None:
        """The unit that is being done raised."""
        at = self._todo.pop(0)
        self._attempts[at] += 1
        if self._attempts[at] < ATTEMPTS:
            self._todo.append(at)
            return
        _set_aside(self.store, self.names[at], ATTEMPTS, *_said(error))

    def give_back(self) -> None:
        """Nobody else does it."""


def left(store: Store, names: Sequence[str]) -> list[int]:
    """The numbers of the units that are neither done nor set aside."""
    there = set(store.names())
    return [i for i, name in enumerate(names) if not {name, f"{FAILED}{name}.json"} & there]


def _publish(turns: "Leased | Allotted", name: str, data: bytes) -> bool:
    """Keep a result where there is none. One that differs from what is there is kept apart, and said."""
    store = turns.store
    there = store.read(name)
    if there.value is None:
        if store.write(name, data, over=there) is not None:
            return True
        there = store.read(name)
    if there.value != data:
        beside = f"{QUARANTINE}{name}.{hashlib.sha256(data).hexdigest()[:12]}"
        store.write(beside, data)
        turns.quarantined.append(name)
        warnings.warn(
            f"two workers have done `{store.path(name)}` and found different bytes: the first result stays, this one "
            f"is `{store.path(beside)}`. Their devices, meshes or versions of jax differ, or a computation is not "
            "deterministic; look at both before you trust either.",
            stacklevel=4,
        )
    return False


def _said(error: Exception) -> tuple[str, str]:
    return f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error))


def _set_aside(store: Store, name: str, attempts: int, error: str, trace: str) -> None:
    page = {"unit": name, "attempts": attempts, "error": error, "traceback": trace}
    key = f"{FAILED}{name}.json"
    store.write(key, json.dumps(page, indent=1).encode(), over=store.read(key))


def try_again(store: Store, names: Sequence[str]) -> None:
    """Forget that units were set aside, so that whoever comes next tries them again.

    Raises:
        WriteError: The store cannot be written.
    """
    there = set(store.names())
    for name in names:
        if (key := f"{FAILED}{name}.json") in there:
            store.write(key, None)
