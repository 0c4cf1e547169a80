"""That new numbers mean no new program: JAX says so itself, of every program in the process."""

from contextlib import contextmanager

import jax


@contextmanager
def nothing_compiles(caplog):
    """Fails where anything is compiled inside. What is to be repeated must have run once before."""
    caplog.clear()
    with jax.log_compiles(), caplog.at_level("WARNING"):
        yield
    compiled = [line for line in caplog.messages if line.startswith("Compiling")]
    assert not compiled, compiled
