"""Whether an exported program gives what its module gives, on the example that it was exported for."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mechjax.base.errors import UnsupportedModelError
from mechjax.base.optional import require
from mechjax.interop.pytorch.arguments import Arguments
from mechjax.interop.pytorch.arrays import from_tensor
from mechjax.interop.pytorch.export import Exported, device_of
from mechjax.interop.pytorch.graph import module_of
from mechjax.interop.pytorch.trees import chosen, plain

APART = {4: 1e-3, 2: 0.25, 1: 0.5}
"""Bytes of a number (4 or more) -> how far outputs may be apart, as a part of their norm.

Some hundred times what rounding does to the architectures tested (2e-6 in 32 bits). In fewer bits a router may choose
another expert for a token.
"""
WHOLE = 0.01
"""The part of whole numbers and truth values that may be others, where numbers that round apart were compared."""

Watch = Callable[[Any, Any], None]


def check_agreement(
    module: Any, arguments: Arguments, fixed: dict[str, Any], output: str | int | None, exported: Exported,
    run: Callable[[list[jax.Array], Watch | None], Any],
) -> None:  # fmt: skip
    """Run the module on its example, and the program that was made of it, and compare.

    Buffers that the call writes to are copies: the module is left as it is.

    Args:
        module: The module.
        arguments: Its example.
        fixed: Keyword arguments of every call.
        output: The part of the output that the program returns.
        exported: What `export` made of these.
        run: The program on the example's arrays; where it is given a second argument, that is told every node's value.

    Raises:
        UnsupportedModelError: They differ. Names the first operation that does, and its module; or says that
            `torch.export` itself changed what the module does.
    """
    torch = require("torch", extra="torch")
    device = device_of(module)
    args, kwargs = arguments.call([x.to(device).clone() for _, x in arguments.leaves], fixed=fixed)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with torch.no_grad():
        out = torch.func.functional_call(module, buffers, args, kwargs)
    expected = jax.tree.leaves(chosen(plain(out), output))
    arrays = [from_tensor(x, of=f"`{place}`") for place, x in arguments.leaves]
    found = jax.tree.leaves(run(arrays, None))
    alike = len(found) == len(expected)
    gaps = [_gap(x, y) for x, y in zip(found, expected, strict=True)] if alike else [np.inf]
    if all(gap <= 1 for gap in gaps):
        return
    seen = _values_in_torch(exported, [x.clone() for _, x in arguments.leaves])
    first: list[Any] = []

    def watch(node: Any, value: Any) -> None:
        if not first and isinstance(seen.get(node), torch.Tensor) and _gap(value, seen[node]) > 1:
            first.append(node)

    run(arrays, watch)
    where = (
        f"{first[0].target} in {module_of(first[0])} is the first operation whose numbers differ: its function is "
        "wrong for such arguments, and one that is right may be added to mechjax.interop.pytorch.operations"
        if first
        else "every operation of the graph agrees, so torch.export made another function of the module: look for what "
        "the module does otherwise while it is traced (torch.compiler.is_exporting(), writes in place)"
    )
    raise UnsupportedModelError(
        f"the exported program does not give what {type(module).__name__} gives on the example: outputs are "
        f"{max(gaps):.3g} times as far apart as rounding may bring them. {where}."
    )


def _values_in_torch(exported: Exported, inputs: list[Any]) -> dict[Any, Any]:
    """What torch gives at every node of the graph."""
    torch = require("torch", extra="torch")
    seen: dict[Any, Any] = {}

    class Watched(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            seen[n] = super().run_node(n)
            return seen[n]

    program, left = exported.program, iter(inputs)
    values = dict(program.constants) | dict(program.state_dict)
    given = [
        next(left) if spec.kind.name == "USER_INPUT" else values[spec.target]
        for spec in program.graph_signature.input_specs
    ]
    with torch.no_grad():
        Watched(program.graph_module).run(*(x.cpu() for x in given))
    return seen


def _gap(found: Any, expected: Any) -> float:
    """How far numbers are apart, in units of what is allowed; infinity where others are finite or shapes differ."""
    x, y = np.asarray(found), expected.detach().cpu()
    if x.shape != tuple(y.shape):
        return np.inf
    if not (y.dtype.is_floating_point or y.dtype.is_complex):
        return float((x != y.numpy()).mean() / WHOLE) if x.size else 0.0
    wide = np.complex128 if y.dtype.is_complex else np.float64
    x, y = x.astype(wide), (y if y.dtype.is_complex else y.double()).numpy().astype(wide)
    if (np.isfinite(x) != np.isfinite(y)).any():
        return np.inf
    x, y = (np.where(np.isfinite(v), v, 0) for v in (x, y))
    allowed = APART[min(expected.element_size(), 4)] * (np.linalg.norm(y.ravel()) or 1.0)
    return float(np.linalg.norm((x - y).ravel()) / allowed)
