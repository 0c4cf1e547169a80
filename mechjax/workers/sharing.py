"""How a worker shares units with others."""

import math
import os
import secrets
import socket
from dataclasses import dataclass, field

from mechjax.base.errors import ArgumentError
from mechjax.workers.process import this_process


def _name() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"


@dataclass(frozen=True)
class Sharing:
    """By leases, which any number of workers may come to and go from; or, with `worker` and `of`, by numbers.

    By numbers, unit i is that of worker i modulo `of`, which needs nothing of storage but that keys appear whole: each
    worker does its own units and no others, so one that dies has to be started again.

    Attributes:
        worker: Which worker this is, from 0; None for leases.
        of: How many there are.
        expiry: Seconds after which a worker whose lease does not change is taken for dead. It renews eight times as
            often; choose more for storage that stalls for longer.
        owner: What this worker is called, unlike all others.
        process: Which process it is, so that its end is seen at once by others of its machine; None hides it.
    """

    worker: int | None = None
    of: int | None = None
    expiry: float = 60.0
    owner: str = field(default_factory=_name)
    process: str | None = field(default_factory=this_process)

    def __post_init__(self) -> None:
        if (self.worker is None) != (self.of is None):
            raise ArgumentError(
                f"worker={self.worker} of={self.of}: say both, such as `--worker 3 --of 16`, or none, for leases."
            )
        if self.worker is not None and self.of is not None and not 0 <= self.worker < self.of:
            raise ArgumentError(
                f"worker={self.worker} of={self.of}: workers are counted from 0, so of {self.of} the last is "
                f"{self.of - 1}. Where tasks are counted from 1, subtract 1."
            )
        if not (math.isfinite(self.expiry) and self.expiry > 0):
            raise ArgumentError(f"expiry={self.expiry}: seconds, more than 0; 60 is usual.")
