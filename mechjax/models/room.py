"""How many runs fit in some memory, which is what methods take at once; and less of them where that was too much."""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import jax

from mechjax.base.errors import RoomError
from mechjax.models.decoder import Decoder

_P = ParamSpec("_P")
_R = TypeVar("_R")
_halvings: ContextVar[int] = ContextVar("halvings", default=0)
_planned: ContextVar[list[int]] = ContextVar("planned")  # how many things each plan of a call took at once
_remembered: dict[tuple[str, str], int] = {}


def at_once(n_bytes: float, each: int) -> int:
    """How many things of `each` bytes run at once in `n_bytes`, at least one; fewer after memory has run out."""
    number = max(1, int(n_bytes / 2 ** _halvings.get() / each))
    if (seen := _planned.get(None)) is not None:
        seen.append(number)
    return number


def runs_that_fit(
    n_bytes: float, model: Decoder, shape: tuple[int, ...], *, heads_apart: bool = False
) -> int:
    """Runs whose activations fit in `n_bytes`, at least one: the widest arrays of a block, twice (in and out).

    Args:
        n_bytes: The memory.
        model: The decoder.
        shape: That of the tokens of one run, (*batch, pos).
        heads_apart: Whether every head reads a stream of its own.
    """
    c, n_tokens = model.config, math.prod(shape)
    streams = 3 + c.n_heads * heads_apart
    per_token = 2 * (c.d_mlp + streams * c.d_model + c.n_heads * (c.d_head + 2 * shape[-1]))
    return at_once(n_bytes, per_token * n_tokens * model.W_E.dtype.itemsize)


def backs_off(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method with `chunk_size`, which runs with half of what it took at once where memory runs out, and so on.

    What it came to is remembered for this kind of device. Where the caller chose `chunk_size`, and where several
    processes run one program (which must agree), nothing is tried again: the error says what to choose.
    """
    chosen = inspect.signature(method).bind_partial
    name = method.__name__

    @wraps(method)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        chunk = chosen(*args, **kwargs).arguments.get("chunk_size")
        place = (name, jax.devices()[0].device_kind)
        for n in range(_remembered.get(place, 0), 64):
            with _halved(n) as planned:
                try:
                    found = jax.block_until_ready(method(*args, **kwargs))
                except jax.errors.JaxRuntimeError as error:
                    if not out_of_memory(error):
                        raise
                    if chunk is not None or jax.process_count() > 1 or max(planned, default=1) == 1:
                        raise RoomError(_full(name, chunk, max(planned, default=1), error)) from error
                else:
                    _remembered[place] = n
                    return found
        raise AssertionError  # 64 halvings leave one

    return wrapped


@contextmanager
def _halved(n: int) -> Iterator[list[int]]:
    planned: list[int] = []
    tokens = _halvings.set(n), _planned.set(planned)
    try:
        yield planned
    finally:
        _halvings.reset(tokens[0])
        _planned.reset(tokens[1])


def out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; a full disk says RESOURCE_EXHAUSTED too, and is none."""
    said = str(error)
    return "RESOURCE_EXHAUSTED" in said and "No space left on device" not in said


def _full(name: str, chunk: Any, planned: int, error: Exception) -> str:
    said = " ".join(str(error).split())[:300]
    if chunk is not None:
        advice = f"chunk_size={chunk} is too much" + (
            f": try {chunk // 2}, or leave it out." if chunk > 1 else ", though it is one. "
        )
    elif planned > 1:
        advice = f"{planned} ran at once; processes must agree, so choose: chunk_size={planned // 2}."
    else:
        advice = "One at a time is too much."
    if chunk == 1 or (chunk is None and planned == 1):
        advice += (
            " Take fewer or shorter prompts, bfloat16, or a mesh that splits the model; `mj.dry_run` says "
        )
        advice += "what fits."
    return f"{name} ran out of memory. {advice} The device says: {said}"
