"""Flax Linen modules as subjects."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import PyTree

from mechjax.base.errors import ArgumentError
from mechjax.interop.marks import call_marked
from mechjax.interop.naming import Sites, chosen_sites
from mechjax.interop.subject import Subject
from mechjax.transform.static import hold


def from_linen(
    module: Any, variables: Mapping[str, PyTree], *, sites: Sites | None = None, **fixed: Any
) -> Subject:
    """A Linen module with its variables, as a function of its inputs.

    `from_linen(module, variables)(x)` is `module.apply(variables, x)`. What its submodules take and return are sites:
    `Block_2/attn` gives `Block.attn.input` and `Block.attn.output` at layer 2. Methods other than `__call__` have
    their name in between (`embed.attend.output`). Lifted modules (`nn.scan`, `nn.remat`, `nn.vmap`, `nn.jit`) are
    looked into; in `nn.scan` the step is the layer.

    Args:
        module: An unbound Linen module; not changed.
        variables: Its variables, as `module.init` gives them.
        sites: Your own names for some activations, with the names of their last axes if positions or heads are to be
            addressed: `{"resid_post": ("Block.output", ("pos", "d_model"))}`.
        **fixed: Keyword arguments of every call and of `apply`, as they are: `deterministic=True`, `rngs=`, `method=`.

    Returns:
        The subject.

    Raises:
        ArgumentError: `module` is no Linen module, or is bound.
    """
    import flax.linen as nn

    if not isinstance(module, nn.Module):
        raise ArgumentError(
            f"from_linen takes a flax.linen.Module and its variables, got {type(module).__name__}. There are also "
            "from_nnx and from_equinox."
        )
    if module.scope is not None:
        raise ArgumentError(
            f"from_linen was given a bound {type(module).__name__}. Unbind it: module, variables = module.unbind()."
        )
    return _Linen(chosen_sites(sites), hold(module.apply), dict(variables), fixed)


class _Linen(Subject):
    apply: Any
    variables: dict[str, Any]
    fixed: dict[str, Any]

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.apply(self.variables, *args, **(self.fixed | kwargs))

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        import flax.linen as nn

        def intercept(run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], context: Any) -> Any:
            method = context.method_name
            if method == "setup" or method.startswith("<"):  # lifted modules run through lambdas
                return run(*args, **kwargs)
            method = "" if method == "__call__" else method
            return call_marked(tuple(context.module.path), method, run, args, kwargs)

        with nn.intercept_methods(intercept):
            return self._plain(args, kwargs)
