"""PyTorch modules as subjects."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from mechjax.base.errors import ArgumentError
from mechjax.base.optional import require
from mechjax.interop.naming import Sites, chosen_sites
from mechjax.interop.subject import Subject
from mechjax.interop.torch_arguments import arguments
from mechjax.interop.torch_export import export
from mechjax.interop.torch_program import Program


def from_torch(
    module: Any, example: Any, *, sites: Sites | None = None, output: str | int | None = None,
    dynamic: bool = True, **fixed: Any,
) -> Subject:  # fmt: skip
    """A PyTorch module as a pure function."""
    torch = require("torch", extra="torch")
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError(
            f"from_torch takes a torch.nn.Module, got {type(module).__name__}. There are also from_linen, from_nnx and "
            "from_equinox."
        )
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        shown = ", ".join(f"`{name}`" for name in training[:3]) + (" and more" if len(training) > 3 else "")
        raise ArgumentError(f"{shown} would train: dropout draws random numbers. Call module.eval() first.")
    chosen = chosen_sites(sites)
    taken = arguments(module, example)
    exported = export(module, taken, fixed, output, dynamic=dynamic)
    program = Program(taken, exported)
    return _Torch(chosen, program, **program.state(exported))


class _Torch(Subject):
    program: Program = eqx.field(static=True)
    parameters: dict[str, Array]
    buffers: dict[str, Array]

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _compiled(self.program, self._state, self._arrays(args, kwargs))

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.program(self._state, self._arrays(args, kwargs))

    @property
    def _state(self) -> dict[str, dict[str, Array]]:
        return {"parameters": self.parameters, "buffers": self.buffers}

    def _arrays(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[jax.Array]:
        arrays = self.program.arguments.arrays(args, kwargs)
        self.program.check(arrays)
        return arrays


@eqx.filter_jit
def _compiled(program: Program, state: dict[str, dict[str, Array]], arrays: list[jax.Array]) -> Any:
    return program(state, arrays)
