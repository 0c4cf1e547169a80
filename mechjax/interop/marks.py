"""Marks: what a module takes in and hands on, tagged while the model is traced, before anybody knows their names.

A mark is a `site` with a number for a name. Which marks stay in the program, in what order and inside which loops is
known only when the whole model is traced (a scan traces its body more than once, a module may be called twice);
`naming` then gives each its name.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from mechjax.transform import site

_RAW = "mark:"


@dataclass(frozen=True)
class Mark:
    """One activation of one call of a module.

    Attributes:
        path: Where the module lies in the model, as its library spells it (`("blocks_0", "attn")`).
        method: The method called; "" for `__call__`.
        side: "input" or "output".
        leaf: Where the array lies in the arguments or the result; "" for the first.
        call: The number of the call, unique in a trace.
    """

    path: tuple[str, ...]
    method: str
    side: str
    leaf: str
    call: int


@dataclass(eq=False)
class Recorder:
    """The marks of one trace.

    Attributes:
        marks: The marks; the site of the i-th is called `raw_name(i)`.
        calls: How many calls there were.
        wrappers: Calls that only wrap another call of the same method (a lifted `remat` or `scan`).
        running: The calls that have not returned: (path, method, number).
    """

    marks: list[Mark] = field(default_factory=list)
    calls: int = 0
    wrappers: set[int] = field(default_factory=set)
    running: list[tuple[tuple[str, ...], str, int]] = field(default_factory=list)

    def tag(self, x: jax.Array, mark: Mark) -> jax.Array:
        """One array, marked."""
        self.marks.append(mark)
        return site(x, raw_name(len(self.marks) - 1))

    def mark(self, value: Any, path: tuple[str, ...], method: str, side: str, call: int) -> Any:
        """`value` with every array in it marked; only tuples, lists and dictionaries are looked into."""

        def marked(x: Any, at: tuple[str, ...]) -> Any:
            if isinstance(x, jax.Array):
                if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys are no activations
                    return x
                return self.tag(x, Mark(path, method, side, leaf_name(at), call))
            if isinstance(x, tuple):
                parts = [marked(part, (*at, str(i))) for i, part in enumerate(x)]
                return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
            if type(x) is list:
                return [marked(part, (*at, str(i))) for i, part in enumerate(x)]
            if type(x) is dict:
                return {key: marked(part, (*at, str(key))) for key, part in x.items()}
            return x

        return marked(value, ())


@dataclass(frozen=True)
class _Now:
    """Who records, and how many calls there were.

    As a user context it is part of every JAX cache key. It changes with every call, so that a function under `jit`
    that calls a module is traced anew each time: a trace that is used again would have the marks of another layer.
    """

    recorder: Recorder
    calls: int


_now = jax.make_user_context(None)  # made once, at import: making contexts is not thread-safe


def leaf_name(at: tuple[str, ...]) -> str:
    """Name of a place in arguments or a result: "" for the first, `1`, `0.mask`."""
    return ".".join(at) if any(part != "0" for part in at) else ""


def raw_name(i: int) -> str:
    """Name of the site of the i-th mark, until it gets its own."""
    return f"{_RAW}{i}"


def mark_number(name: str) -> int | None:
    """The number of the mark whose site has this name; None for any other site."""
    return int(name.removeprefix(_RAW)) if name.startswith(_RAW) else None


@contextmanager
def recording(recorder: Recorder) -> Iterator[None]:
    """Record the calls of modules made inside."""
    with _now(_Now(recorder, 0)):
        yield


def recorder() -> Recorder | None:
    """Who records now."""
    return None if _now.value is None else _now.value.recorder


def call_marked(
    path: tuple[str, ...],
    method: str,
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """`run(*args, **kwargs)`, a module's method, with its input and output marked if anybody records."""
    if _now.value is None:
        return run(*args, **kwargs)
    recorder: Recorder = _now.value.recorder
    call, recorder.calls = recorder.calls, recorder.calls + 1
    recorder.wrappers |= {n for *same, n in recorder.running if same == [path, method]}
    recorder.running.append((path, method, call))
    try:
        args = recorder.mark(args, path, method, "input", call)
        kwargs = recorder.mark(kwargs, path, method, "input", call)
        out = run(*args, **kwargs)
    finally:
        recorder.running.pop()
        _now(
            _Now(recorder, recorder.calls)
        ).__enter__()  # until `recording` ends, which puts back what was before
    return recorder.mark(out, path, method, "output", call)
