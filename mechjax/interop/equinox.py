"""Equinox modules as subjects."""

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


def from_equinox(model: Any, *, sites: Sites | None = None, **fixed: Any) -> Subject:
    """An Equinox module as a subject.

    What its submodules take and return when called are sites, named after their place in the tree: `model.blocks[2]
    .attn` gives `blocks.attn.input` and `blocks.attn.output` at layer 2. Where stacked modules are run by `lax.scan`,
    the step is the layer. As ever in Equinox the model may be written for one example: `from_equinox(model).batched()`
    takes many, and its edits may differ between these; under `jax.vmap(subject)` an edit sees one example.

    Args:
        model: A callable `eqx.Module`; not changed. Its arrays are leaves of the subject.
        sites: As in `from_linen`.
        **fixed: Keyword arguments of every call, as they are: `key=None`, `inference=True`.

    Returns:
        The subject.

    Raises:
        ArgumentError: `model` is no Equinox module, or cannot be called.
    """
    if not isinstance(model, eqx.Module) or not callable(model):
        what = "which cannot be called" if isinstance(model, eqx.Module) else "which is no equinox.Module"
        raise ArgumentError(
            f"from_equinox takes an equinox.Module with a __call__, got {type(model).__name__}, {what}. There are also "
            "from_linen and from_nnx."
        )
    return _Equinox(chosen_sites(sites), model, fixed)


class _Equinox(Subject):
    model: Any
    fixed: dict[str, Any]

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **(self.fixed | kwargs))

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _marked(self.model, ())(*args, **(self.fixed | kwargs))


def _marked(node: Any, path: tuple[Any, ...]) -> Any:
    """The tree with every callable module in it of a class whose calls are marked."""

    def is_module_inside(x: Any) -> bool:
        return isinstance(x, eqx.Module) and x is not node

    leaves, tree = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_module_inside)
    node = jax.tree.unflatten(
        tree, [_marked(leaf, path + at) if isinstance(leaf, eqx.Module) else leaf for at, leaf in leaves]
    )
    if not callable(node):
        return node
    marked = object.__new__(
        _marking(type(node))
    )  # its fields are set already: no constructor, no checks again
    for name, value in vars(node).items():
        object.__setattr__(marked, name, value)
    object.__setattr__(marked, _PATH, jax.tree_util.keystr(path, simple=True, separator="/"))
    return marked


@functools.lru_cache(maxsize=1024)
def _marking(cls: type) -> type:
    """A subclass whose calls are marked; the path is a static field, so it survives `partition`, `scan` and `vmap`."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = tuple(part for part in getattr(self, _PATH).split("/") if part)
        return call_marked(path, "", functools.partial(cls.__call__, self), args, kwargs)

    body = {
        "__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__,
        "__annotations__": {_PATH: str}, _PATH: eqx.field(static=True, default=""),
    }  # fmt: skip
    return types.new_class(cls.__name__, (cls,), {}, lambda namespace: namespace.update(body))
