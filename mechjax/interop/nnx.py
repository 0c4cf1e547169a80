"""Flax NNX modules as subjects."""

import functools
import types
from typing import Any

import equinox as eqx
import jax

from mechjax.base.errors import ArgumentError
from mechjax.interop.marks import call_marked
from mechjax.interop.naming import Sites, chosen_sites
from mechjax.interop.subject import Subject

_PATH = "mechjax_path"


def from_nnx(model: Any, *, sites: Sites | None = None, **fixed: Any) -> Subject:
    """An NNX module as a pure function of its inputs.

    What its submodules take and return when called are sites: `model.blocks[2].attn` gives `blocks.attn.input` and
    `blocks.attn.output` at layer 2. Modules stacked by `nnx.vmap` and run by `nnx.scan` are looked into; the step is
    the layer. The model is copied as it is now; what a call would change in it (statistics of a norm, counters of
    random numbers) is dropped, so that every call starts from the same state.

    Args:
        model: An `nnx.Module`; not changed.
        sites: As in `from_linen`.
        **fixed: Keyword arguments of every call, as they are: `deterministic=True`.

    Returns:
        The subject.

    Raises:
        ArgumentError: `model` is no NNX module.
    """
    from flax import nnx

    if not isinstance(model, nnx.Module):
        raise ArgumentError(
            f"from_nnx takes a flax.nnx.Module, got {type(model).__name__}. There are also from_linen and from_equinox."
        )
    graph, state = nnx.split(model)
    return _NNX(chosen_sites(sites), graph, state, fixed)


class _NNX(Subject):
    graph: Any = eqx.field(static=True)
    state: Any
    fixed: dict[str, Any]

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._merged()(*args, **(self.fixed | kwargs))

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        from flax import nnx

        model = self._merged()  # fresh objects: nobody else sees their classes change
        for path, module in nnx.iter_modules(model):
            if callable(module):
                vars(module)[_PATH] = "/".join(map(str, path))
                object.__setattr__(module, "__class__", _marking(type(module)))
        return model(*args, **(self.fixed | kwargs))

    def _merged(self) -> Any:
        from flax import nnx

        here = jax.tree.map(lambda x: x, self.state)  # variables may change only in the trace that made them
        return nnx.merge(self.graph, here)


@functools.lru_cache(maxsize=1024)
def _marking(cls: type) -> type:
    """A subclass whose calls are marked; the path is an attribute, so it survives splitting and merging."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = tuple(part for part in vars(self)[_PATH].split("/") if part)
        return call_marked(path, "", functools.partial(cls.__call__, self), args, kwargs)

    body = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(body))
