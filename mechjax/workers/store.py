"""What workers share: keys and their bytes, in a folder or a bucket, written only where nobody wrote in between.

Reading and writing is tensorstore's (`KvStore`): a key appears whole or not at all, and a write can be made to depend
on the key's generation, which changes with every write. Drivers promise different things; `KINDS` says what.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorstore as ts

from mechjax.base.errors import ArgumentError, CheckpointError, WriteError, did_you_mean

_FAILURES = (ValueError, OSError, RuntimeError, KeyError)  # what tensorstore raises for what storage does
_NOT_WRITTEN = b""  # the generation that a write has whose condition did not hold


@dataclass(frozen=True)
class Kind:
    """What a kind of storage promises.

    Attributes:
        leases: Whether a write that depends on a generation is atomic, so that leases hold.
        tried: Whether mechjax's tests run on it.
        promise: Why, in a sentence.
    """

    leases: bool
    tried: bool
    promise: str


KINDS = {
    "file": Kind(
        True, True,
        "Folders, by the file system's locks: those of a network file system count between machines where it has "
        "shared locks (NFS 4, Lustre mounted with `flock`).",
    ),
    "gs": Kind(
        True, False,
        "Google Cloud Storage, by its conditional writes (tensorstore's documentation; not tried by mechjax's tests).",
    ),
    "s3": Kind(
        False, False,
        "Amazon S3 and what speaks its language: tensorstore documents that deletes are not atomic there, and beside "
        "AWS not even writes (not tried by mechjax's tests).",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What a key held when it was read.

    Attributes:
        value: Its bytes; None where there is no such key.
        generation: What a later write compares; a missing key has one too.
    """

    value: bytes | None
    generation: bytes


class Store:
    """Keys under one folder or prefix; made by `opened`.

    Attributes:
        place: Where it is, as the user wrote it.
        kind: What it promises.
    """

    def __init__(self, keys: ts.KvStore, place: str, kind: Kind) -> None:
        self.place, self.kind, self._keys = place, kind, keys

    def within(self, name: str) -> "Store":
        """The keys that begin with `name/`."""
        return Store(self._keys / f"{name}/", f"{self.place.rstrip('/')}/{name}", self.kind)

    def read(self, key: str) -> Entry:
        """What a key holds now.

        Raises:
            CheckpointError: It cannot be read.
        """
        try:
            found = self._keys.read(key).result()
        except _FAILURES as error:
            raise self._unreadable(key, error) from error
        return Entry(found.value if found.state == "value" else None, found.stamp.generation)

    def write(self, key: str, value: bytes | None, *, over: Entry | None = None) -> Entry | None:
        """Give a key bytes, or with None take it away; it is on storage when this returns.

        Args:
            key: Which.
            value: Its bytes.
            over: What it was read to hold: if somebody has written since, nothing happens. None writes in any case.

        Returns:
            What it holds now; None where somebody was quicker.

        Raises:
            WriteError: It cannot be written.
        """
        try:
            stamp = self._keys.write(key, value, if_equal=None if over is None else over.generation).result()
            if stamp.generation != _NOT_WRITTEN:
                return Entry(value, stamp.generation)
        except _FAILURES as error:
            raise WriteError(
                f"cannot write `{self.path(key)}`: {_reason(error)}. Choose a folder that can be written, or make room."
            ) from error
        there = self.read(key)  # of a write whose answer was lost on the way, and that was sent again
        return there if value is not None and there.value == value else None

    def __contains__(self, key: str) -> bool:
        try:
            return key in self._keys
        except _FAILURES as error:
            raise self._unreadable(key, error) from error

    def names(self, prefix: str = "") -> list[str]:
        """The keys that begin so, in order, without the prefix.

        Raises:
            CheckpointError: They cannot be listed.
        """
        try:
            found = self._keys.list(ts.KvStore.KeyRange(prefix, _after(prefix))).result()
        except _FAILURES as error:
            raise self._unreadable(prefix, error) from error
        return sorted(key.decode("utf-8", "replace").removeprefix(prefix) for key in found)

    def path(self, key: str) -> str:
        """Where a key is, for messages."""
        return f"{self.place.rstrip('/')}/{key}"

    def _unreadable(self, key: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot read `{self.path(key)}`: {_reason(error)}.")


def opened(place: str | os.PathLike[str]) -> Store:
    """The store at a path or URL. Nothing is made until something is written.

    Args:
        place: A folder, or `file:///folder`, `gs://bucket/prefix` or `s3://bucket/prefix`.

    Raises:
        ArgumentError: A URL of another kind.
    """
    given = os.fspath(place)
    scheme, colon, rest = given.partition("://")
    scheme = scheme if colon else "file"
    kind = KINDS.get(scheme)
    if kind is None:
        raise ArgumentError(
            f"`{given}`: storage of the kind `{scheme}://` is not known. Give a folder, or a URL that begins with "
            f"{', '.join(f'`{known}://`' for known in KINDS)}.{did_you_mean(scheme, KINDS)}"
        )
    spec: Any = f"{given.rstrip('/')}/"
    if scheme == "file":
        spec = {"driver": "file", "path": f"{Path(rest or given).expanduser().absolute()}/"}
    try:
        return Store(ts.KvStore.open(spec).result(), given, kind)
    except _FAILURES as error:
        raise ArgumentError(f"`{given}` cannot be opened: {_reason(error)}.") from error


def _after(prefix: str) -> str:
    """The first key, in order, that does not begin so; what is empty has no end."""
    return prefix and prefix[:-1] + chr(ord(prefix[-1]) + 1)


def _reason(error: Exception) -> str:
    """What tensorstore says, without the places in its source."""
    return str(error).partition(" [source locations")[0].strip().rstrip(".") or type(error).__name__
