"""What every model is: a pytree of arrays, and so no key of JAX's caches."""

from typing import NoReturn

import equinox as eqx

from mechjax.base.errors import JitError


class Unhashed(eqx.Module):
    """A module that says what to do where `jax.jit(model)` would hash it."""

    def __hash__(self) -> NoReturn:
        raise JitError(
            "A model cannot be hashed, which `jax.jit(model)` needs: its weights would become constants. "
            "Use `equinox.filter_jit(model)(...)`, or pass the model as an argument: "
            "`equinox.filter_jit(lambda model, tokens: model(tokens))`. A plain `model(...)` is compiled already."
        )
