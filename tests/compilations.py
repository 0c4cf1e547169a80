"""That new numbers mean no new program: JAX says so itself, of every program in the process."""

from contextlib import contextmanager

import jax
import numpy as np

import mechjax as mj
from tests.tolerances import TOL


@contextmanager
def nothing_compiles(caplog):
    """Fails where anything is compiled inside. What is to be repeated must have run once before."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        yield
    compiled = [line for line in caplog.messages if line.startswith("Compiling")]
    assert not compiled, compiled


def assert_numbers_are_data(run, pair, metric, caplog):
    """Other prompts and answers need no other program; nor do equal prompts, whose scores are zero."""
    first = run(*pair, metric).scores
    other = mj.metrics.logit_diff(np.array([6, 7, 8], np.int32), np.array([9, 5, 1], np.int32))
    with nothing_compiles(caplog):
        turned, same = run(*pair[::-1], other).scores, run(pair[0], pair[0], metric).scores
    assert np.abs(turned - first).max() > 0.01
    np.testing.assert_allclose(same, np.zeros(same.shape), **TOL["float32", "law"])
