"""torchax's table of what PyTorch's operations are in JAX, without its changes to the process that imports it.

torchax 0.0.13 names overloads of named tensors (`prod.dim_Dimname`), which torch 2.13 no longer has, so that its import
fails. While it is imported, such names are answered with placeholders, which no graph can hold. Its import also
switches off torch's fast path of attention and sets a variable of the environment: both are put back. What stays is
that torch's spare device type is called "jax".
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mechjax.base.optional import require

_TELEMETRY = "ENABLE_RUNTIME_UPTIME_TELEMETRY"


@dataclass(frozen=True)
class Lowerings:
    """What torchax knows.

    Attributes:
        functions: An operation (an overload, or a packet of overloads) -> its function of JAX arrays.
        decompositions: An operation -> a Python function that spells it in simpler ones; for `run_decompositions`.
    """

    functions: Mapping[Any, Callable[..., Any]]
    decompositions: dict[Any, Callable[..., Any]]


@functools.cache
def lowerings() -> Lowerings:
    """The tables of torchax.

    Raises:
        MissingExtraError: torch or torchax is not installed.
    """
    torch = require("torch", extra="torch")
    with _left_alone(torch), _named_tensor_overloads(torch):
        require("torchax", extra="torch")
        table = require("torchax.ops.ops_registry", extra="torch").all_aten_ops
        require("torchax.ops.jaten", extra="torch")
        decompositions = require("torchax.decompositions", extra="torch").DECOMPOSITIONS
    known = {
        operation: entry.func
        for operation, entry in table.items()
        if entry.is_jax_function and not entry.needs_env
    }
    return Lowerings(
        known, {key: value for key, value in decompositions.items() if not isinstance(key, _Gone)}
    )


@dataclass(frozen=True)
class _Gone:
    """An overload that torch no longer has."""

    packet: str
    overload: str


@contextmanager
def _named_tensor_overloads(torch: Any) -> Iterator[None]:
    packet = torch._ops.OpOverloadPacket
    own = packet.__getattr__

    def found(self: Any, key: str) -> Any:
        try:
            return own(self, key)
        except AttributeError:
            if "imname" not in key and "names" not in key:
                raise
            return _Gone(str(self), key)

    packet.__getattr__ = found
    try:
        yield
    finally:
        packet.__getattr__ = own


@contextmanager
def _left_alone(torch: Any) -> Iterator[None]:
    fast, telemetry = torch.backends.mha.get_fastpath_enabled(), os.environ.get(_TELEMETRY)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        os.environ.pop(_TELEMETRY, None)
        if telemetry is not None:
            os.environ[_TELEMETRY] = telemetry
