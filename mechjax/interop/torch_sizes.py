"""Which sizes an exported graph holds for, and which it was exported at."""

from typing import Any

from mechjax.base.errors import ShapeError

Axis = tuple[str, int]  # an array's place in the arguments, and an axis of it


def check_sizes(axes: dict[Axis, Any], sizes: dict[Axis, int]) -> None:
    """Compare a call's sizes with those of the graph.

    Args:
        axes: Of every axis the size it has in the graph: a number where it is fixed, else torch's `SymInt`.
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
    for guard in _guards(axes):
        if guard.subs(values) == False:  # noqa: E712 (sympy's own)
            raise ShapeError(
                f"the exported graph does not hold for {_listed(values, symbols)}: the module takes another way unless "
                f"{_in_words(guard, symbols)}. Make another subject from an example of this size."
            )


def _guards(axes: dict[Axis, Any]) -> list[Any]:
    """What torch.export took for granted of sizes."""
    free = [size for size in axes.values() if not isinstance(size, int)]
    if not free:
        return []
    env = free[0].node.shape_env
    bounds = [
        bound
        for symbol, known in env.var_to_range.items()
        for bound in ((symbol >= known.lower), (symbol <= known.upper))
        if bound not in (True, False)
    ]
    return [guard.expr for guard in env.guards] + bounds


def _named(axis: Axis) -> str:
    return f"axis {axis[1]} of `{axis[0]}`"


def _listed(values: dict[Any, int], symbols: dict[Any, Axis]) -> str:
    return ", ".join(f"{_named(symbols[symbol])} = {value}" for symbol, value in values.items())


def _in_words(expression: Any, symbols: dict[Any, Axis]) -> str:
    text = str(expression)
    for symbol, axis in symbols.items():
        text = text.replace(str(symbol), f"{axis[0]}.shape[{axis[1]}]")
    return text
