"""A PyTorch module as a graph, with marks at its submodules' inputs and outputs.

While `torch.export` runs the module, hooks put an operation `mechjax::mark` on every tensor that a submodule takes or
returns. A mark stands in the graph exactly where a forward hook would have seen the value, and stays there however the
graph is decomposed, whether or not anything reads it.
"""

import contextlib
import dataclasses
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.base.optional import require
from mechjax.interop.marks import Mark, leaf_name
from mechjax.interop.pytorch.arguments import Arguments
from mechjax.interop.pytorch.graph import operations, reshape_views, stop_gradients
from mechjax.interop.pytorch.operations import OPERATIONS
from mechjax.interop.pytorch.sizes import conditions, count, later_conditions
from mechjax.interop.pytorch.torchax_shim import lowerings
from mechjax.interop.pytorch.trees import changed, chosen, plain
from mechjax.interop.pytorch.writes import refuse_writes


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """What `torch.export` made of a module.

    Attributes:
        program: The `ExportedProgram`, decomposed.
        marks: The marks; `mechjax::mark(x, i)` is the i-th.
        output: The structure of what the module returns; its leaves are the graph's outputs.
        holding: Conditions on torch's symbols for sizes under which the graph is the module's.
    """

    program: Any
    marks: tuple[Mark, ...]
    output: Any
    holding: tuple[Any, ...]


@dataclasses.dataclass(eq=False)
class _Trace:
    """What the hooks saw in one run of the module."""

    marks: list[Mark] = dataclasses.field(default_factory=list)
    running: list[tuple[tuple[str, ...], int]] = dataclasses.field(default_factory=list)
    calls: int = 0
    output: Any = None

    def clear(self) -> None:
        self.marks, self.running, self.calls = [], [], 0


def export(
    module: Any, arguments: Arguments, fixed: dict[str, Any], output: str | int | None, *, dynamic: bool
) -> Exported:
    """The module's graph for these arguments, in the operations that torchax knows.

    Raises:
        ArgumentError: The module itself cannot be called so, or does not return a tree of tensors.
        UnsupportedModelError: `torch.export` cannot carry what the module does; names the submodule.
    """
    torch = require("torch", extra="torch")
    known = lowerings()
    trace = _Trace()

    class Called(torch.nn.Module):
        """The module as a function of a flat list of tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *leaves: Any) -> Any:
            trace.clear()
            args, kwargs = arguments.call(leaves, fixed=fixed)
            tree = chosen(plain(self.module(*args, **kwargs)), output)
            flat, trace.output = jax.tree.flatten(tree)
            return tuple(flat)

    tensors = tuple(tensor.to(device_of(module)) for _, tensor in arguments.leaves)
    with warnings.catch_warnings(), _hooks(module, trace):
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        try:
            program = _exported(torch, Called(), tensors, dynamic)
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:
            where, line = _where(module, trace), _line_of(error)
            raise _explained(error, where, line, lambda: Called()(*tensors)) from error
        holding, known_before = conditions(program), count(program)
        reshape_views(program.graph_module)
        stop_gradients(program.graph_module)
        refuse_writes(program.graph_module, trace.marks)
        table = torch.export.default_decompositions()
        table.update(known.decompositions)
        for operation in [operation for operation in table if str(operation) in OPERATIONS]:
            del table[operation]
        program = program.run_decompositions(table)
    holding += later_conditions(program, known_before)
    return Exported(program, tuple(trace.marks), trace.output, tuple(holding))


def _exported(torch: Any, called: Any, tensors: tuple[Any, ...], dynamic: bool) -> Any:
    """Exported with as many axes free as can be: all; all but of 1; only the first of each; none."""
    config = require("torch.fx.experimental._config", extra="torch")
    free, first = torch.export.Dim.AUTO, {0}
    attempts = ((True, None), (False, None), (True, first), (False, set()))
    for oblivious, only in attempts if dynamic else attempts[-1:]:
        axes = tuple({axis: free for axis in range(t.dim()) if only is None or axis in only} for t in tensors)
        try:
            with config.patch(backed_size_oblivious=oblivious):  # no size is taken to be 1, nor not to be
                return torch.export.export(called, tensors, dynamic_shapes={"leaves": axes}, strict=False)
        except ArgumentError:
            raise
        except Exception:
            if only == set():
                raise
    raise AssertionError  # the last attempt returned or raised


@contextlib.contextmanager
def _hooks(module: Any, trace: _Trace) -> Iterator[None]:
    mark = operations().mark.default

    def marked(value: Any, path: tuple[str, ...], side: str, call: int) -> Any:
        def one(x: Any, at: tuple[str, ...]) -> Any:
            trace.marks.append(Mark(path, "", side, leaf_name(at), call))
            return mark(x, len(trace.marks) - 1)

        return changed(value, (), one)

    def before(path: tuple[str, ...], module: Any, args: Any, kwargs: Any) -> Any:
        call, trace.calls = trace.calls, trace.calls + 1
        trace.running.append((path, call))
        return marked(args, path, "input", call), marked(kwargs, path, "input", call)

    def after(path: tuple[str, ...], module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        _, call = trace.running.pop()
        return marked(out, path, "output", call)

    # First of all hooks: those that note a value for later, as transformers' of hidden states do, then note the mark.
    how = {"with_kwargs": True, "prepend": True}
    handles = []
    for name, submodule in module.named_modules():
        path = tuple(name.split(".")) if name else ()
        handles.append(submodule.register_forward_pre_hook(functools.partial(before, path), **how))
        handles.append(submodule.register_forward_hook(functools.partial(after, path), **how))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def device_of(module: Any) -> Any:
    """Where a module's numbers lie."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), "cpu")


def _where(module: Any, trace: _Trace) -> str:
    path = trace.running[-1][0] if trace.running else ()
    kind = type(module.get_submodule(".".join(path))).__name__
    return f"`{'.'.join(path)}` ({kind})" if path else f"the module itself ({kind})"


def _line_of(error: BaseException) -> str:
    """The last line of the user's or a library's code that ran before torch raised."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [f for f in frames if "/torch/" not in f.filename and "/mechjax/interop/" not in f.filename]
    return (
        f" at `{theirs[-1].line}` ({theirs[-1].filename.rpartition('/')[2]}:{theirs[-1].lineno})"
        if theirs
        else ""
    )


def _explained(error: Exception, where: str, line: str, eagerly: Callable[[], Any]) -> Exception:
    """The error to raise for one that `torch.export` raised."""
    torch = require("torch", extra="torch")
    try:
        with torch.no_grad():
            eagerly()
    except (ArgumentError, UnsupportedModelError) as own:
        return own
    except Exception as own:
        return ArgumentError(
            f"the module itself cannot be called with this example: {type(own).__name__}: {_first_line(own)}. Give the "
            "tensors that it takes: a tensor, a tuple, or a dictionary of names."
        )
    depends = "data-dependent" in str(error) or "unbacked" in str(error).lower()
    what = (
        "what it does next depends on the numbers in a tensor (an `if`, a loop or an index)"
        if depends
        else "what it does"
    )
    return UnsupportedModelError(
        f"torch.export cannot carry {where}: {what}{line}. torch says: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
