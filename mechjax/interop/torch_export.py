"""A PyTorch module as a graph, with marks at its submodules' inputs and outputs.

While `torch.export` runs the module, hooks put an operation `mechjax::mark` on every tensor that a submodule takes or
returns. A mark stands in the graph exactly where a forward hook would have seen the value, and stays there however the
graph is decomposed, whether or not anything reads it.
"""

import contextlib
import copy
import dataclasses
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.base.optional import require
from mechjax.interop.marks import Mark, leaf_name
from mechjax.interop.torch_arguments import Arguments
from mechjax.interop.torch_operations import OPERATIONS
from mechjax.interop.torchax_shim import lowerings


@dataclasses.dataclass(frozen=True, eq=False)
class Exported:
    """What `torch.export` made of a module.

    Attributes:
        program: The `ExportedProgram`, decomposed.
        marks: The marks; `mechjax::mark(x, i)` is the i-th.
        output: The structure of what the module returns; its leaves are the graph's outputs.
    """

    program: Any
    marks: tuple[Mark, ...]
    output: Any


@dataclasses.dataclass(eq=False)
class _Trace:
    """What the hooks saw in one run of the module."""

    marks: list[Mark] = dataclasses.field(default_factory=list)
    running: list[tuple[tuple[str, ...], int]] = dataclasses.field(default_factory=list)
    calls: int = 0
    output: Any = None

    def clear(self) -> None:
        self.marks, self.running, self.calls = [], [], 0


@functools.cache
def operations() -> Any:
    """Our own operations in torch's registry: `mark` and `stop` (of gradients); both are identities.

    Raises:
        MissingExtraError: torch is not installed.
    """
    torch = require("torch", extra="torch")
    library = torch.library.Library("mechjax", "DEF")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("mark(Tensor x, int number) -> Tensor", tags=tags)
    library.define("stop(Tensor x) -> Tensor", tags=tags)
    library.impl("mark", lambda x, number: x.clone(), "CompositeExplicitAutograd")
    library.impl("stop", lambda x: x.clone(), "CompositeExplicitAutograd")
    torch.fx.node.has_side_effect(torch.ops.mechjax.mark.default)  # else a value that nobody reads is dropped
    operations.library = library  # it unregisters what it defined when it is let go
    return torch.ops.mechjax


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
            tree = _chosen(_plain(self.module(*args, **kwargs), ("output",)), output)
            flat, trace.output = jax.tree.flatten(tree)
            return tuple(flat)

    tensors = tuple(tensor.to(_device(module)) for _, tensor in arguments.leaves)
    with warnings.catch_warnings(), _hooks(module, trace):
        warnings.simplefilter("ignore")  # torch's own, about its own parts
        try:
            program = _exported(torch, Called(), tensors, dynamic)
        except (ArgumentError, UnsupportedModelError):
            raise
        except Exception as error:
            where, line = _where(module, trace), _line_of(error)
            raise _explained(error, where, line, lambda: Called()(*tensors)) from error
        _reshape_views(torch, program.graph_module)
        _stop_gradients(torch, program.graph_module)
        _refuse_writes(program.graph_module, trace.marks)
        table = torch.export.default_decompositions()
        table.update(known.decompositions)
        for operation in [operation for operation in table if str(operation) in OPERATIONS]:
            del table[operation]
        program = program.run_decompositions(table)
    return Exported(program, tuple(trace.marks), trace.output)


def module_of(node: Any) -> str:
    """Where in the module a node of the graph comes from, in words."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    paths = [path.removeprefix("module").removeprefix(".") for path, _ in stack]
    return f"`{paths[-1]}`" if paths and paths[-1] else "the module itself"


def _exported(torch: Any, called: Any, tensors: tuple[Any, ...], dynamic: bool) -> Any:
    """Exported with as many axes free as can be: all; all but of 1; only the first of each; none."""
    config = require("torch.fx.experimental._config", extra="torch")
    free, first = torch.export.Dim.AUTO, {0}
    attempts = ((True, None), (False, None), (True, first), (False, set()))
    for oblivious, only in attempts if dynamic else attempts[-1:]:
        axes = tuple(
            {axis: free for axis in range(t.dim()) if only is None or axis in only} for t in tensors
        )
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
    torch = require("torch", extra="torch")

    def marked(value: Any, path: tuple[str, ...], side: str, call: int) -> Any:
        def one(x: Any, at: tuple[str, ...]) -> Any:
            trace.marks.append(Mark(path, "", side, leaf_name(at), call))
            return mark(x, len(trace.marks) - 1)

        return _tensors_changed(torch, value, (), one)

    def before(path: tuple[str, ...], module: Any, args: Any, kwargs: Any) -> Any:
        call, trace.calls = trace.calls, trace.calls + 1
        trace.running.append((path, call))
        return marked(args, path, "input", call), marked(kwargs, path, "input", call)

    def after(path: tuple[str, ...], module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        _, call = trace.running.pop()
        return marked(out, path, "output", call)

    handles = []
    for name, submodule in module.named_modules():
        path = tuple(name.split(".")) if name else ()
        handles.append(
            submodule.register_forward_pre_hook(functools.partial(before, path), with_kwargs=True)
        )
        handles.append(submodule.register_forward_hook(functools.partial(after, path), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors_changed(torch: Any, value: Any, at: tuple[str, ...], change: Callable[..., Any]) -> Any:
    """The value with every tensor in it changed; tuples, lists, dictionaries and dataclasses are looked into."""
    if isinstance(value, torch.Tensor):
        return change(value, at)
    parts = _parts(value)
    if parts is None:
        return value
    new = {key: _tensors_changed(torch, part, (*at, str(key)), change) for key, part in parts.items()}
    if all(new[key] is part for key, part in parts.items()):
        return value
    if isinstance(value, tuple):
        return type(value)(*new.values()) if hasattr(value, "_fields") else type(value)(new.values())
    changed = copy.copy(value)
    for key, part in new.items():
        if isinstance(value, (list, Mapping)):
            changed[key] = part
        else:
            object.__setattr__(changed, key, part)
    return changed


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key; None for what is no container."""
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _plain(value: Any, at: tuple[str, ...]) -> Any:
    """What a module returned, as tuples, lists and dictionaries of tensors."""
    torch = require("torch", extra="torch")
    if value is None or isinstance(value, torch.Tensor):
        return value
    parts = _parts(value)
    if parts is None:
        return _Opaque(".".join(at), type(value).__name__)
    new = {key: _plain(part, (*at, str(key))) for key, part in parts.items()}
    if isinstance(value, tuple):
        return type(value)(*new.values()) if hasattr(value, "_fields") else tuple(new.values())
    if isinstance(value, list):
        return list(new.values())
    return new


@dataclasses.dataclass(frozen=True)
class _Opaque:
    """Something in an output that is no tree of tensors."""

    place: str
    kind: str


def _chosen(tree: Any, output: str | int | None) -> Any:
    """The part of the output that is asked for.

    Raises:
        ArgumentError: There is no such part, or it is no tree of tensors.
    """
    if output is not None:
        parts = _parts(tree) or {}
        if output not in parts:
            known = ", ".join(repr(key) for key in parts) or "no parts: it is one tensor"
            raise ArgumentError(f"the module's output has no {output!r}; it has {known}.")
        tree = parts[output]
    opaque = next((x for x in jax.tree.leaves(tree) if isinstance(x, _Opaque)), None)
    if opaque is not None:
        hint = " For a Hugging Face model: use_cache=False." if "Cache" in opaque.kind else ""
        raise ArgumentError(
            f"`{opaque.place}` of what the module returns is a {opaque.kind}, which is no tensor, tuple, list, dictionary "
            f"or dataclass of tensors.{hint} Or take one part of the output: from_torch(..., output='logits')."
        )
    if not jax.tree.leaves(tree):
        raise ArgumentError("the module returns no tensor, so there is no function to make of it.")
    return tree


def _device(module: Any) -> Any:
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


def _reshape_views(torch: Any, graph_module: Any) -> None:
    """Make views reshapes: decomposed, what they are views of may have other strides, which JAX has none of."""
    for inner in graph_module.modules():
        for node in getattr(inner, "graph", torch.fx.Graph()).nodes:
            if node.target is torch.ops.aten.view.default:
                node.target = torch.ops.aten.reshape.default


def _stop_gradients(torch: Any, graph_module: Any) -> None:
    """Make `detach` and `no_grad` operations of the graph: decomposition takes both for identities."""
    stop, aten = operations().stop.default, torch.ops.aten
    for inner in graph_module.modules():
        if not isinstance(inner, torch.fx.GraphModule):
            continue
        for node in list(inner.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target is aten.detach.default:
                node.target = stop
            elif str(node.target) == "wrap_with_set_grad_enabled" and node.args[0] is False:
                for part in list(node.users):
                    with inner.graph.inserting_after(part):
                        stopped = inner.graph.call_function(stop, (part,))
                    stopped.meta = dict(part.meta)
                    part.replace_all_uses_with(stopped, delete_user_cb=lambda user, s=stopped: user is not s)
        inner.recompile()


def _refuse_writes(graph_module: Any, marks: list[Mark]) -> None:
    """Refuse a write in place into what a mark stands before, where that is read again.

    A mark is a copy, so the graph would read the value from before the write.

    Raises:
        UnsupportedModelError: There is one.
    """
    nodes = list(graph_module.graph.nodes)
    source: dict[Any, Any] = {}  # a view -> what it is a view of
    for i, node in enumerate(nodes):
        for argument, value in _aliased(node):
            root = source.get(value, value)
            source.setdefault(node, root)
            while argument.is_write and str(root.target) == "mechjax.mark.default":
                mark = marks[root.args[1]]
                root = source.get(root.args[0], root.args[0])
                again = [
                    later for later in nodes[i + 1 :] if any(source.get(a, a) is root for a in later.all_input_nodes)
                ]
                if again:
                    raise UnsupportedModelError(
                        f"{node.target} writes in place into the {mark.side} of `{'.'.join(mark.path)}`, which "
                        f"{again[0].target} in {module_of(again[0])} reads again. In a pure function that would be the old "
                        "value: write `x = x + y` in the module in place of `x += y`."
                    )


def _aliased(node: Any) -> list[tuple[Any, Any]]:
    """The arguments of an operation that its result shares memory with, or that it writes to."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    pairs = zip(schema.arguments, node.args, strict=False)
    return [(a.alias_info, value) for a, value in pairs if a.alias_info is not None and hasattr(value, "op")]
