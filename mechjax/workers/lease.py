"""A claim to a unit, which lasts as long as its owner renews it.

A lease is a key that says who works on a unit and how often it was renewed. It is made, renewed, given back and taken
over by writes that happen only if nobody wrote in between, so two never own one.

No clock is compared with another's: whoever finds a lease remembers it, and takes it over when it has not changed for
as long as its owner promised, by the finder's own monotonic clock. A process of this machine that has ended is known to
have ended, and is not waited for.
"""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mechjax.base.errors import ArgumentError, MechjaxError
from mechjax.workers.process import is_gone
from mechjax.workers.sharing import Sharing
from mechjax.workers.store import Entry, Store

LEASES = ".leases/"
_LONGEST = 86_400.0  # seconds that anybody is waited for
_BEATS = 8  # renewals in the time that a lease lasts without any


@dataclass(frozen=True)
class Lease:
    """What a lease says.

    Attributes:
        owner: Who works on the unit; None for nobody, who remembers how often it was tried.
        process: Which process that is, where it can be told.
        attempt: The how-manieth try this is, from 1.
        expiry: Seconds without a renewal after which the owner is to be taken for dead.
        beats: How often it was renewed.
        error: What the last try ended with, if it said so.
    """

    owner: str | None
    process: str | None = None
    attempt: int = 1
    expiry: float = 0.0
    beats: int = 0
    error: str | None = None

    def packed(self) -> bytes:
        """As it is stored."""
        return json.dumps(dataclasses.asdict(self)).encode()


def read_lease(value: bytes) -> Lease:
    """What was stored; what cannot be read is the lease of somebody who does not renew it."""
    try:
        found: Any = json.loads(value)
        text = lambda key: None if found[key] is None else str(found[key])
        expiry = min(max(float(found["expiry"]), 0.0), _LONGEST)
        return Lease(
            text("owner"), text("process"), int(found["attempt"]), expiry, int(found["beats"]), text("error")
        )
    except (ValueError, TypeError, KeyError, OverflowError):
        return Lease("somebody whose lease cannot be read")


def check_sharing(store: Store, sharing: Sharing) -> None:
    """Whether units can be shared so on this storage, before it is asked for anything.

    Raises:
        ArgumentError: They cannot.
    """
    if sharing.worker is None and not store.kind.leases:
        raise ArgumentError(
            f"`{store.place}` cannot hold leases, by which workers would share units: {store.kind.promise} Say which "
            "units are whose instead, when each worker is started: `--worker 3 --of 16` (in Python "
            "`Sharing(worker=3, of=16)`), for each worker from 0 to 15."
        )


class Leases:
    """The leases of one worker, one at a time: renewed by a thread until it is given back. A context manager."""

    def __init__(
        self, store: Store, sharing: Sharing, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin; nothing is claimed yet.

        Raises:
            ArgumentError: Storage on which leases do not hold.
        """
        check_sharing(store, sharing)
        self.store, self.sharing, self._clock = store, sharing, clock
        self._seen: dict[str, tuple[Entry, float]] = {}
        self._held: tuple[str, Lease, Entry] | None = None
        self._lock, self._end = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, name="mechjax-lease", daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def claim(self, name: str) -> Lease | None:
        """The lease of a unit, now this worker's; None where somebody else is at it.

        Raises:
            CheckpointError: It cannot be read.
            WriteError: It cannot be written.
        """
        there = self.store.read(LEASES + name)
        error, attempt = None, 1
        if there.value is not None:
            found = read_lease(there.value)
            if not self._is_free(name, there, found):
                return None
            error, attempt = found.error, found.attempt + 1
            if found.owner is not None:
                error = f"{found.owner} ended, or was stopped, without a word while it worked on it."
        me = self.sharing
        mine = Lease(me.owner, me.process, attempt, me.expiry, 0, error)
        entry = self.store.write(LEASES + name, mine.packed(), over=there)
        if entry is None:
            return None
        with self._lock:
            self._held = (name, mine, entry)
        return mine

    def drop(self) -> None:
        """Take away the lease that is held: its unit is settled."""
        self._end_with(lambda lease: None)

    def failed(self, error: str) -> None:
        """Give back the lease that is held, for anybody to try again."""
        self._end_with(lambda lease: Lease(None, attempt=lease.attempt, error=error))

    def give_back(self) -> None:
        """Give back the lease that is held, as if the unit had not been tried."""
        self._end_with(
            lambda lease: (
                Lease(None, attempt=lease.attempt - 1, error=lease.error) if lease.attempt > 1 else None
            )
        )

    def _end_with(self, left: Callable[[Lease], Lease | None]) -> None:
        with self._lock:
            if self._held is None:
                return
            (name, lease, entry), self._held = self._held, None
            then = left(lease)
            self.store.write(LEASES + name, None if then is None else then.packed(), over=entry)

    def _is_free(self, name: str, there: Entry, lease: Lease) -> bool:
        """Whether nobody works on it any more."""
        if lease.owner is None or is_gone(lease.process):
            return True
        now = self._clock()
        before, since = self._seen.get(name, (None, now))
        if before != there:
            self._seen[name] = (there, now)
            return False
        return now - since >= (lease.expiry or self.sharing.expiry)

    def _renew(self) -> None:
        while not self._end.wait(self.sharing.expiry / _BEATS):
            self._renew_once()

    def _renew_once(self) -> None:
        with self._lock:
            if self._held is None:
                return
            name, lease, entry = self._held
            later = dataclasses.replace(lease, beats=lease.beats + 1)
            try:
                now = self.store.write(LEASES + name, later.packed(), over=entry)
            except MechjaxError:  # the next may succeed; if none does, the lease is taken over
                return
            self._held = None if now is None else (name, later, now)
