"""Which programs were compiled, and why."""

import warnings
from collections import deque
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax

from mechjax.transform.context import tracing
from mechjax.transform.static import Held

_LIMIT = 1000  # the newest compilations that are remembered
_FRESH = 4  # traces that differ in the function of `apply` alone before a warning


@dataclass(frozen=True)
class Compilation:
    """One program that was traced for compilation.

    Attributes:
        function: What was transformed.
        asked: The sites captured and the edits made, without their numbers.
        shapes: Shapes of the arguments' arrays.
        reason: "new function", "new shape", "new sites", "new edits", "new function in apply" or "new context".
    """

    function: str
    asked: str
    shapes: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}: {self.function} [{self.asked}] on {', '.join(self.shapes)}"


class CompileLog(tuple[Compilation, ...]):
    """Compilations in order; prints one line each."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self)) or "nothing was compiled"


@dataclass(frozen=True)
class _Fingerprint:
    function: Any
    sites: Any
    edits: Any
    fns: Any
    shapes: Any


_entries: deque[tuple[_Fingerprint, Compilation]] = deque(maxlen=_LIMIT)
_warned: set[Any] = set()


def compile_log(*, clear: bool = False) -> CompileLog:
    """The programs that transformed functions compiled in this process, oldest first, one line each with its reason.

    Args:
        clear: Forget them afterwards.
    """
    entries = CompileLog(entry for _, entry in _entries)
    if clear:
        _entries.clear()
    return entries


def record(program: Any, data: Any, edits: Any, reads: Any) -> None:
    """Note a trace; called while it happens. Transforms inside another transform are part of its program."""
    if tracing():
        return
    shapes = tuple(_short(x) for x in data)
    mine = _Fingerprint(
        program.function,
        tuple((r.site, r.layers, tuple(sorted(r.index)), _identity(r.reduce)) for r in reads),
        tuple((e.site, e.kind, e.layer is None, tuple(sorted(e.index)), _shapes(e)) for e in edits),
        tuple(_identity(e.fn) for e in edits),
        shapes,
    )
    asked = ", ".join([r.site for r in reads] + [f"{e.kind} {e.site}" for e in edits]) or "nothing"
    arguments = tuple(_short(x) for x in data[program.n_own :])
    _entries.append((mine, Compilation(program.name, asked, arguments, _reason(mine))))


def _short(x: Any) -> str:
    aval = jax.typeof(x)
    return f"{aval.dtype}{list(aval.shape)}"


def _shapes(edit: Any) -> Any:
    return tuple(_short(x) for x in jax.tree.leaves(edit) if eqx.is_array(x))


def _identity(fn: Any) -> Any:
    if fn is None or isinstance(fn, Held):
        return None if fn is None else fn.fn
    return (jax.tree.structure(fn),)  # by itself a structure refuses to be compared with anything else


def _reason(mine: _Fingerprint) -> str:
    same = [f for f, _ in _entries if f.function == mine.function]
    if not same:
        return "new function"
    if any((f.sites, f.edits, f.fns) == (mine.sites, mine.edits, mine.fns) for f in same):
        known = any(
            (f.sites, f.edits, f.fns, f.shapes) == (mine.sites, mine.edits, mine.fns, mine.shapes)
            for f in same
        )
        return "new context" if known else "new shape"
    twins = [f for f in same if (f.sites, f.edits, f.shapes) == (mine.sites, mine.edits, mine.shapes)]
    if twins:
        _warn_of_fresh_functions(mine, len({f.fns for f in twins}) + 1)
        return "new function in apply"
    return "new edits" if all(f.edits != mine.edits for f in same) else "new sites"


def _warn_of_fresh_functions(mine: _Fingerprint, n: int) -> None:
    key = (mine.function, mine.sites, mine.edits)
    if n < _FRESH or key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"`apply` was compiled {n} times for functions that differ only in identity: a lambda made at every call is a "
        "new function each time. Define it once, and pass what changes as data: apply(site, fn, *data).",
        stacklevel=2,
    )
