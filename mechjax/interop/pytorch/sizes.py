"""Which sizes an exported graph holds for, and which it was exported at."""

from typing import Any

from mechjax.base.errors import ShapeError

Axis = tuple[str, int]  # an array's place in the arguments, and an axis of it


def conditions(program: Any) -> list[Any]:
    """What holds of the sizes that an exported program leaves open, as conditions on torch's symbols."""
    bounds = [
        bound
        for symbol, known in program.range_constraints.items()
        for bound in (symbol >= known.lower, symbol <= known.upper)
        if bound not in (True, False)
    ]
    return bounds + [guard.expr for guard in _guards(program)]


def later_conditions(program: Any, before: int) -> list[Any]:
    """Conditions that decomposing a program added, but for those on how a tensor lies in memory."""
    return [guard.expr for guard in _guards(program)[before:] if not _of_layout(guard)]


def count(program: Any) -> int:
    """How many conditions torch has noted down so far."""
    return len(_guards(program))


def _guards(program: Any) -> list[Any]:
    inputs = (node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder")
    sizes = [size for value in inputs for size in getattr(value, "shape", ()) if not isinstance(size, int)]
    return list(sizes[0].node.shape_env.guards) if sizes else []


def _of_layout(guard: Any) -> bool:
    """Whether torch asked only how a tensor lies in its memory, which decides between a view and a copy."""
    frame = getattr(guard.sloc, "framework_loc", None)
    file, function = getattr(frame, "filename", ""), getattr(frame, "name", "")
    return "/torch/_prims_common/" in file.replace("\\", "/") or function.startswith("_reshape_view_helper")


def check_sizes(axes: dict[Axis, Any], holding: tuple[Any, ...], sizes: dict[Axis, int]) -> None:
    """Compare a call's sizes with those of the graph.

    Args:
        axes: Of every axis the size it has in the graph: a number where it is fixed, else torch's `SymInt`.
        holding: Conditions on the sizes under which the graph is the module's.
        sizes: The call's.

    Raises:
        ShapeError: An axis is fixed at another size, or the graph is another one for such sizes.
    """
    symbols: dict[Any, Axis] = {}
    for axis, size in axes.items():
        if isinstance(size, int):
            if sizes[axis] != size:
                raise ShapeError(
                    f"{_named(axis)} is {sizes[axis]}, but the exported graph holds for {size} only: the module's code "
                    "makes a number of this size, or torch.export cannot leave it open. Pad or cut to it, or make "
                    "another subject from an example of the other size."
                )
        elif size.node.expr.is_symbol:
            symbols.setdefault(size.node.expr, axis)
    values = {symbol: sizes[axis] for symbol, axis in symbols.items()}
    for axis, size in axes.items():
        if not isinstance(size, int) and (wanted := size.node.expr.subs(values)) != sizes[axis]:
            raise ShapeError(
                f"{_named(axis)} is {sizes[axis]}, where {wanted} would go with the other arguments "
                f"({_in_words(size.node.expr, symbols)})."
            )
    for guard in holding:
        if guard.subs(values) == False:  # noqa: E712 (sympy's own)
            raise ShapeError(
                f"the exported graph does not hold for {_listed(values, symbols)}: the module takes another way unless "
                f"{_in_words(guard, symbols)}. Make another subject from an example of this size."
            )


def _named(axis: Axis) -> str:
    return f"axis {axis[1]} of `{axis[0]}`"


def _listed(values: dict[Any, int], symbols: dict[Any, Axis]) -> str:
    return ", ".join(f"{_named(symbols[symbol])} = {value}" for symbol, value in values.items())


def _in_words(expression: Any, symbols: dict[Any, Axis]) -> str:
    text = str(expression)
    for symbol, axis in symbols.items():
        text = text.replace(str(symbol), f"{axis[0]}.shape[{axis[1]}]")
    return text
