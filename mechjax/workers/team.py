"""A worker of several processes: one mesh, of which the first process alone speaks with the others about units."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Team:
    """The processes of one worker.

    Attributes:
        size: How many.
        first: Whether this is the one that claims and publishes.
        told: What the first process says, to all of them: called by each, with a number that counts in the first's.
    """

    size: int
    first: bool
    told: Callable[[int], int]


ALONE = Team(1, True, lambda number: number)


def team_of_processes() -> Team:
    """The processes that `jax.distributed` brought together; alone where it did not."""
    import jax

    if jax.process_count() == 1:
        return ALONE
    import numpy as np
    from jax.experimental import multihost_utils

    def told(number: int) -> int:
        return int(multihost_utils.broadcast_one_to_all(np.int32(number)))

    return Team(jax.process_count(), jax.process_index() == 0, told)
