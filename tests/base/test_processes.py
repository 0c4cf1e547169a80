"""What one process does for all; with several, `tests/parallel/test_every_method.py` has it (`save`, `write`, `refused`)."""

import pytest

from mechjax.base.errors import WriteError
from mechjax.base.processes import by_the_first


def test_by_the_first__of_one_process__gives_what_was_done_or_its_error():
    assert by_the_first(lambda: 3) == 3

    def fails():
        raise WriteError("no room")

    with pytest.raises(WriteError, match="no room"):
        by_the_first(fails)


def test_by_the_first__of_two_processes__acts_in_one_and_tells_the_other(monkeypatch):
    """The other process's side, with what the first would send it."""
    from jax.experimental import multihost_utils

    monkeypatch.setattr("jax.process_count", lambda: 2)
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: 0)
    acted = []
    assert by_the_first(lambda: acted.append(1)) is None and not acted
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: 1)
    with pytest.raises(WriteError, match="the first process, which does this for all, failed"):
        by_the_first(lambda: acted.append(1))
    assert not acted
