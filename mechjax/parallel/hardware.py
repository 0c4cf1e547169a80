"""Devices that are not here, by name: how many there are and what one of them holds."""

import re
from dataclasses import dataclass

from mechjax.base.errors import ArgumentError, did_you_mean

_GIB = 1 << 30
MEMORY = {
    "v4": 32 * _GIB, "v5e": 16 * _GIB, "v5p": 95 * _GIB, "v6e": 32 * _GIB,
    "A100": 80e9, "H100": 80e9, "H200": 141e9, "B200": 180e9,
}  # fmt: skip
"""Bytes of one device: TPUs as cloud.google.com/tpu/docs says of each version, GPUs as their data sheets do."""
FREE = 0.95
"""The part of it that a program can have: a v5e offers 15.75 of its 16 GiB, and what is estimated may be larger."""


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind.

    Attributes:
        kind: What they are called, such as "v5e".
        n: How many there are.
    """

    kind: str
    n: int

    @property
    def room(self) -> int:
        """Bytes that a program can have on one of them."""
        return int(FREE * MEMORY[self.kind])


def hardware(name: str) -> Hardware:
    """The devices that a name describes: `"v5e-256"`, `"v5e:16x16"`, `"8xH200"`, `"H100"`.

    Raises:
        ArgumentError: No such devices.
    """
    by_number = re.fullmatch(r"(?P<kind>[^-:]+?)(?:-(?P<n>\d+)|:(?P<sides>\d+(?:x\d+)*))?", name)
    in_front = re.fullmatch(r"(?P<n>\d+)x(?P<kind>\S+)", name)
    found = in_front or by_number
    kinds = {kind.lower(): kind for kind in MEMORY}
    kind = kinds.get(found["kind"].lower()) if found else None
    parts = [] if not found else (found.groupdict().get("sides") or found["n"] or "1").split("x")
    n = 1
    for part in parts:
        n *= int(part)
    if kind is None or n < 1:
        raise ArgumentError(
            f"devices={name!r}: expected such as 'v5e-256', 'v5e:16x16', '8xH200', of {', '.join(MEMORY)}."
            f"{did_you_mean(found['kind'] if found else name, MEMORY)}"
        )
    return Hardware(kind, n)
