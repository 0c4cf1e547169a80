"""Which combinations of a task are held out: decided by a stable hash, so that every machine and version agrees."""

import hashlib
from collections.abc import Callable
from typing import Literal, TypeVar

from mechjax.base.errors import ArgumentError

Split = Literal["train", "test"]
Drawn = TypeVar("Drawn")

TEST_SHARE = 5  # one combination in five is held out


def split_of(*parts: str) -> Split:
    """The split that the combination `parts` (a task, a template, the names in it...) belongs to."""
    digest = hashlib.blake2b("\x1f".join(parts).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") % TEST_SHARE == 0 else "train"


def draw(propose: Callable[[], Drawn], key: Callable[[Drawn], tuple[str, ...]], split: str) -> Drawn:
    """The first proposal whose combination, `key(proposal)`, belongs to `split`."""
    if split not in ("train", "test"):
        raise ArgumentError(f"split={split!r}: the splits are 'train' and 'test'. Pass one of the two.")
    while True:
        drawn = propose()
        if split_of(*key(drawn)) == split:
            return drawn
