"""Which costly sites somebody asks to see while a function is being traced.

A model may offer sites that cost something to form (per-head query inputs, per-head results). It asks
`wanted("result")` while it is traced and forms them only then. The answer lives in a `jax.make_user_context`
value, which is part of every JAX cache key: no global flag, and no stale trace is reused. The transform sets it
while it traces; user code never does.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVERYTHING = frozenset({"*"})
_NOTHING: frozenset[str] = frozenset()
_names = jax.make_user_context(_NOTHING)  # made once, at import: making contexts is not thread-safe


def wanted(name: str) -> bool:
    """Whether the transform that traces the caller asks for the site `name`."""
    names = _names.value
    return name in names or names == EVERYTHING


def tracing() -> bool:
    """Whether a mechjax transform is tracing the caller."""
    return _names.value != _NOTHING


@contextmanager
def wanting(names: frozenset[str]) -> Iterator[None]:
    """Trace with `names` wanted, beside those that an enclosing transform already wants."""
    outer = _names.value
    merged = EVERYTHING if EVERYTHING in (outer, names) else outer | names
    with _names(merged):
        yield
