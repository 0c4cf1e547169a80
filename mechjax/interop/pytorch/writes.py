"""Writes in place that a pure function would not see.

A mark hands on a copy, where in the module itself a submodule takes and returns the memory that its caller holds. So do
stops of gradients, and dropout as `torch.export` has it. What is then written into one copy is not in the others. Which
values share memory in the module is kept by torch, in the storage of what a graph's nodes were traced with.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mechjax.base.errors import UnsupportedModelError
from mechjax.base.optional import require
from mechjax.interop.marks import Mark
from mechjax.interop.pytorch.graph import module_of

_MARK = "mechjax.mark.default"
_COPIES = (_MARK, "mechjax.stop.default", "aten.dropout.default")


@dataclass(frozen=True, eq=False)
class _Copy:
    """Values that share memory in the graph.

    Attributes:
        memory: What they share in the module, with other copies.
        maker: The node that copied it; None for what is no copy.
    """

    memory: int
    maker: Any = None


def refuse_writes(graph_module: Any, marks: list[Mark]) -> None:
    """Refuse a write in place into one copy of a memory where another copy, from before, is read afterwards.

    Raises:
        UnsupportedModelError: There is one.
    """
    copies: dict[Any, _Copy] = {}
    known: dict[int, list[_Copy]] = {}  # a memory -> its copies so far
    last: dict[int, _Copy] = {}  # where torch kept a value -> the copy that it is of
    stale: dict[
        _Copy, tuple[Any, _Copy]
    ] = {}  # a copy -> the write that it lacks, and into which other that went
    for node, inputs in _in_order(graph_module):
        for value in inputs:
            lacking = stale.get(copies[value]) if value in copies else None
            if lacking is not None:
                raise _refused(*lacking, copies[value], node, marks)
        for value in _written(node):
            others = [copy for copy in known[copies[value].memory] if copy is not copies[value]]
            stale |= dict.fromkeys(others, (node, copies[value]))
        storage = _storage(node)
        if storage is None:
            continue
        sources = [copies[a] for a in inputs if a in copies and _storage(a) == storage]
        if str(node.target) in _COPIES:
            copies[node] = _Copy(copies[node.args[0]].memory, node)
        else:
            copies[node] = sources[0] if sources else last.get(storage) or _Copy(storage)
        last[storage] = copies[node]
        if copies[node] not in known.setdefault(copies[node].memory, []):
            known[copies[node].memory].append(copies[node])


def _in_order(graph_module: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The nodes as they run, with what they read; those of a graph inside (of `no_grad`) after what runs it."""
    torch = require("torch", extra="torch")
    for node in graph_module.graph.nodes:
        inputs = list(node.all_input_nodes)
        yield node, inputs
        for at, value in enumerate(node.args):
            inner = _attribute(graph_module, value.target) if getattr(value, "op", "") == "get_attr" else None
            if isinstance(inner, torch.fx.GraphModule):
                given = iter(node.args[at + 1 :])
                for part, read in _in_order(inner):
                    if part.op != "output":
                        yield part, [next(given)] if part.op == "placeholder" else read


def _attribute(graph_module: Any, path: str) -> Any:
    for name in path.split("."):
        graph_module = getattr(graph_module, name)
    return graph_module


def _storage(node: Any) -> int | None:
    """Where torch kept a value while it traced; of several, the first."""
    torch = require("torch", extra="torch")
    value = node.meta.get("val")
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return next((part.untyped_storage()._cdata for part in parts[:1] if isinstance(part, torch.Tensor)), None)


def _written(node: Any) -> list[Any]:
    """The values that an operation writes into."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    given = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
    found: list[Any] = []
    for argument in schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            require("torch.fx", extra="torch").node.map_arg(given.get(argument.name), found.append)
    return found


def _refused(write: Any, into: _Copy, other: _Copy, reader: Any, marks: list[Mark]) -> Exception:
    makers = [copy.maker for copy in (into, other) if copy.maker is not None]
    marked = next((maker for maker in makers if str(maker.target) == _MARK), None)
    if marked is None:
        what = f"what {makers[0].target} in {module_of(makers[0])} hands on"
    else:
        mark = marks[marked.args[1]]
        what = f"the {mark.side} of " + (f"`{'.'.join(mark.path)}`" if mark.path else "the module itself")
    return UnsupportedModelError(
        f"{write.target} writes in place into {what}, or into what that shares memory with, and {reader.target} in "
        f"{module_of(reader)} reads it again. In a pure function that would be the old value: write `x = x + y` in the "
        "module in place of `x += y`."
    )
