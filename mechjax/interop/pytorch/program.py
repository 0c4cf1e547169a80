"""An exported graph as a JAX function: each operation by torchax's function for it, or by one of ours."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from mechjax.base.errors import ShapeError, UnsupportedModelError
from mechjax.base.optional import require
from mechjax.interop.marks import recorder
from mechjax.interop.pytorch.arguments import Arguments
from mechjax.interop.pytorch.arrays import array_dtype, from_tensor
from mechjax.interop.pytorch.export import Exported
from mechjax.interop.pytorch.graph import module_of
from mechjax.interop.pytorch.operations import OPERATIONS
from mechjax.interop.pytorch.sizes import Axis, check_sizes
from mechjax.interop.pytorch.torchax_shim import lowerings

State = dict[str, dict[str, jax.Array]]  # "parameters" and "buffers", by torch's names


class Program:
    """A graph without its numbers, as a static part of a subject: compared by identity.

    Attributes:
        arguments: What it is called with.
    """

    def __init__(self, arguments: Arguments, exported: Exported) -> None:
        self.arguments = arguments
        self._nodes = _without_checks_of_numbers(list(exported.program.graph_module.graph.nodes))
        self._marks = exported.marks
        self._output = exported.output
        self._holding = exported.holding
        self._torch = require("torch", extra="torch")
        self._state, self._axes = _inputs(exported.program, arguments)
        self._results = [
            i
            for i, spec in enumerate(exported.program.graph_signature.output_specs)
            if spec.kind.name == "USER_OUTPUT"
        ]
        self._functions = {
            node: _function(node) for node in self._nodes if node.op not in ("placeholder", "output")
        }

    def state(self, exported: Exported) -> State:
        """Copies of the module's numbers; what is tied is one array, under its first name."""
        found: State = {"parameters": {}, "buffers": {}}
        for kind, name, tensor in self._tensors(exported.program):
            if name not in found[kind]:
                if (
                    kind == "parameters"
                    and array_dtype(tensor.dtype, of=name).itemsize < tensor.element_size()
                ):
                    raise UnsupportedModelError(
                        f"parameter `{name}` is {tensor.dtype}, for which JAX needs jax_enable_x64. Switch it on, or "
                        "convert the module: module.float()."
                    )
                found[kind][name] = from_tensor(tensor, of=f"`{name}`")
        return found

    def _tensors(self, program: Any) -> list[tuple[str, str, Any]]:
        values = dict(program.constants) | dict(program.state_dict)
        wanted = {spec.target: spec for spec in program.graph_signature.input_specs if spec.target}
        return [
            (kind, name, values[target])
            for target, spec in wanted.items()
            for kind, name in [self._state[spec.arg.name]]
        ]

    def check(self, arrays: list[jax.Array]) -> None:
        """Refuse sizes that the graph does not hold for.

        Raises:
            ShapeError: They are others.
        """
        check_sizes(self._axes, self._holding, _sizes(self.arguments, arrays))

    def __call__(
        self, state: State, arrays: list[jax.Array], watch: Callable[[Any, Any], None] | None = None
    ) -> Any:
        """Run the graph, marking values if anybody records; `watch` is told each node and its value."""
        values: dict[Any, Any] = {}
        left = iter(arrays)

        def value(node: Any) -> Any:
            return values[node]

        with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
            for node in self._nodes:
                if node.op == "placeholder":
                    kept = self._state.get(node.name)
                    values[node] = next(left) if kept is None else state[kept[0]][kept[1]]
                elif node.op == "output":
                    outs = self._torch.fx.node.map_arg(node.args[0], value)
                    return jax.tree.unflatten(self._output, [outs[i] for i in self._results])
                else:
                    args, kwargs = (self._torch.fx.node.map_arg(x, value) for x in (node.args, node.kwargs))
                    values[node] = self._run(node, args, kwargs)
                    if watch is not None:
                        watch(node, values[node])
        raise AssertionError  # a graph ends with its output

    def _run(self, node: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if str(node.target) == "mechjax.mark.default":
            now = recorder()
            return args[0] if now is None else now.tag(args[0], self._marks[args[1]])
        args, kwargs = _for_jax(args, kwargs, self._torch)
        try:
            with warnings.catch_warnings():  # torchax asks for int64, and gets what JAX has
                warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
                out = self._functions[node](*args, **kwargs)
        except (ShapeError, UnsupportedModelError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{node.target} in {module_of(node)} cannot be run in JAX on such arguments: "
                f"{type(error).__name__}: {error}"
            ) from error
        return _as_in_torch(node, out, node.meta.get("val"))


def _inputs(program: Any, arguments: Arguments) -> tuple[dict[str, tuple[str, str]], dict[Axis, Any]]:
    """The graph's inputs: names of those that are state -> kind and name; and sizes of the others' axes."""
    placeholders = {node.name: node for node in program.graph_module.graph.nodes if node.op == "placeholder"}
    values = dict(program.constants) | dict(program.state_dict)
    first: dict[Any, tuple[str, str]] = {}  # the memory of a tensor -> the first that has it
    state: dict[str, tuple[str, str]] = {}
    axes: dict[Axis, Any] = {}
    places = iter(place for place, _ in arguments.leaves)
    for spec in program.graph_signature.input_specs:
        kind = spec.kind.name
        if kind == "USER_INPUT":
            place = next(places)
            axes |= {(place, i): size for i, size in enumerate(placeholders[spec.arg.name].meta["val"].shape)}
        elif kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            name = spec.target.removeprefix("module.")
            own = ("parameters" if kind == "PARAMETER" else "buffers", name)
            tensor = values[spec.target]
            memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            state[spec.arg.name] = first.setdefault(memory, own) if tensor.numel() else own
        else:
            raise UnsupportedModelError(
                f"the exported graph takes `{spec.target}`, a {kind.lower()}, beside tensors; no JAX function can."
            )
    return state, axes


def _sizes(arguments: Arguments, arrays: list[jax.Array]) -> dict[Axis, int]:
    places = (place for place, _ in arguments.leaves)
    return {(p, i): n for p, x in zip(places, arrays, strict=True) for i, n in enumerate(x.shape)}


def _function(node: Any) -> Callable[..., Any]:
    """What runs a node.

    Raises:
        UnsupportedModelError: Nothing does; or it draws random numbers, or its size depends on the numbers.
    """
    torch = require("torch", extra="torch")
    target, name = node.target, str(node.target)
    if name in ("mechjax.mark.default",):
        return lambda x, number: x
    if node.op != "call_function":
        raise UnsupportedModelError(f"the exported graph calls `{name}` ({node.op}), which is no operation.")
    if not isinstance(target, torch._ops.OpOverload):
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise UnsupportedModelError(
                f"{name} in {module_of(node)}: control flow inside torch's graph is not carried over."
            )
        return target  # arithmetic of sizes, and `getitem`
    if name not in OPERATIONS and torch.Tag.nondeterministic_seeded in target.tags:
        raise UnsupportedModelError(
            f"{name} in {module_of(node)} draws random numbers, which torch keeps in a hidden state. Switch it off "
            "(module.eval(), dropout of 0), or pass the numbers in as an argument."
        )
    if _depends_on_numbers(node):
        raise UnsupportedModelError(
            f"{name} in {module_of(node)}: its result's shape or number depends on the numbers in a tensor, but shapes "
            "are fixed in a compiled program. Write it with a mask (torch.where)."
        )
    known = lowerings().functions
    found = OPERATIONS.get(name) or known.get(target) or known.get(target.overloadpacket)
    if found is None:
        raise UnsupportedModelError(
            f"{name} in {module_of(node)} has no counterpart in JAX here: torchax has none, and neither has "
            "mechjax.interop.pytorch.operations, where one may be added."
        )
    return found


def _without_checks_of_numbers(nodes: list[Any]) -> list[Any]:
    """The nodes but for what only serves to raise an error for some numbers, which a compiled program cannot."""
    uncertain: set[Any] = set()
    for node in nodes:
        if _depends_on_numbers(node) or any(value in uncertain for value in node.all_input_nodes):
            uncertain.add(node)
    idle: set[Any] = set()
    for node in reversed(nodes):
        kept = node.op != "call_function" or str(node.target) == "mechjax.mark.default"
        if node in uncertain and not kept and all(user in idle for user in node.users):
            idle.add(node)
    return [node for node in nodes if node not in idle]


def _depends_on_numbers(node: Any) -> bool:
    value = node.meta.get("val")
    torch = require("torch", extra="torch")
    unbacked = require("torch.fx.experimental.symbolic_shapes", extra="torch").free_unbacked_symbols
    parts = value if isinstance(value, (tuple, list)) else [value]
    return any(
        bool(unbacked(part))
        for part in parts
        if isinstance(part, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool))
    )


def _for_jax(args: Any, kwargs: Any, torch: Any) -> Any:
    """The arguments with dtypes that JAX has now, and with lists that may be written to, as torchax does."""
    narrow = {
        torch.int64: torch.int32, torch.float64: torch.float32, torch.complex128: torch.complex64,
    }  # fmt: skip
    wide = jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]

    def one(x: Any) -> Any:
        if isinstance(x, list):
            return [one(part) for part in x]
        return narrow.get(x, x) if isinstance(x, torch.dtype) and not wide else x

    return tuple(one(x) for x in args), {key: one(x) for key, x in kwargs.items()}


def _as_in_torch(node: Any, out: Any, expected: Any) -> Any:
    """The result in torch's dtype; JAX promotes scalars otherwise.

    Raises:
        UnsupportedModelError: Its shape is another than torch's.
    """
    if isinstance(out, (tuple, list)) and isinstance(expected, (tuple, list)):
        return tuple(_as_in_torch(node, x, e) for x, e in zip(out, expected, strict=False))
    if not hasattr(expected, "dtype") or out is None:
        return out
    out = jnp.asarray(out)
    fits = out.ndim == len(expected.shape) and all(
        n == m for n, m in zip(out.shape, expected.shape, strict=True) if isinstance(m, int)
    )
    if not fits:
        raise UnsupportedModelError(
            f"{node.target} in {module_of(node)} gives shape {out.shape} in JAX, {tuple(expected.shape)} in torch: its "
            "function is wrong; one that is right may be added to mechjax.interop.pytorch.operations."
        )
    dtype = array_dtype(expected.dtype, of=f"{node.target}")
    return out if out.dtype == dtype and not out.weak_type else lax.convert_element_type(out, dtype)
