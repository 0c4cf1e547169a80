"""A checksum of what a function computes: of its program as JAX traces it, and of the arrays that it closes over.

It tells functions apart that nothing else does: a module of another library, a lambda, a closure. The arrays that a
module holds are arguments of the program and not in it; shapes, sites and their names are.

Differs from that of a pytree (`mechjax.base.digests`): what code stands behind a class counts, and what it holds
without using it does not. Another version of JAX may trace the same function to another program.
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from mechjax.base.digests import arrays_digest
from mechjax.transform.context import EVERYTHING
from mechjax.transform.program import trace
from mechjax.transform.static import hold

_CALLBACK = re.compile(r"\bcallback=")
_ADDRESS = re.compile(r" at 0x\w+")


def program_digest(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """SHA-256 of the program of `fn(*args, **kwargs)` with all its sites. Zero FLOPs.

    Returns:
        The checksum; None where the program calls back into Python, so that it does not say what it computes. Backward
        rules of functions' own (`jax.custom_vjp`) are not in it.
    """
    program, _ = trace(hold(fn), args, kwargs, EVERYTHING)
    text = str(program.jaxpr)
    if _CALLBACK.search(text):
        return None
    told = f"{_ADDRESS.sub('', text)} {arrays_digest([jnp.asarray(x) for x in program.consts])}"
    return hashlib.sha256(told.encode()).hexdigest()
