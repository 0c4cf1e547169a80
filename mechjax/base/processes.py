"""What one of several processes does for all, such as writing files that all can read."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np

from mechjax.base.errors import WriteError

_T = TypeVar("_T")


def by_the_first(act: Callable[[], _T]) -> _T | None:
    """`act()` in the first process, for which the others wait, who get None. All must ask, in the same order.

    Raises:
        WriteError: In the others, where the first failed: none of them then waits for one that is gone. In the first
            it is whatever `act` raised.
    """
    if jax.process_count() == 1:
        return act()
    from jax.experimental import multihost_utils

    found, wrong = None, None
    if jax.process_index() == 0:
        try:
            found = act()
        except Exception as error:
            wrong = error
    failed = bool(multihost_utils.broadcast_one_to_all(np.int32(wrong is not None)))
    if wrong is not None:
        raise wrong
    if failed:
        raise WriteError("the first process, which does this for all, failed: its own error says why.")
    return found
