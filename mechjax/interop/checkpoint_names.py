"""Functions that name values by `jax.ad_checkpoint.checkpoint_name`, as MaxText and others do, as subjects."""

from collections.abc import Callable
from typing import Any

from jax.extend.core import primitives as jp

from mechjax.base.errors import ArgumentError, SiteError
from mechjax.interop.marks import Mark, Recorder, raw_name
from mechjax.interop.naming import Name, Sites, chosen_sites, name_occurrences
from mechjax.interop.rewrite import rewrite, with_site
from mechjax.interop.subject import Subject
from mechjax.transform.static import hold, unhold
from mechjax.transform.table import SiteInfo, inner_jaxprs


def from_checkpoint_names(fn: Callable[..., Any], *, sites: Sites | None = None) -> Subject:
    """A function as a subject whose sites are the values that it marks with `checkpoint_name`.

    In a loop, the loop's counter is the layer. Outside loops, values of one name and shape are layers, in the order
    of the program; where they differ in shape, or some stand in loops, they are `name.call_0`, `name.call_1`. The
    marks themselves stay, so a rematerialisation policy that saves names still does.

    Args:
        fn: Any JAX function or module, not yet differentiated.
        sites: As in `from_linen`; paths are the marks' names.

    Returns:
        The subject.

    Raises:
        ArgumentError: `fn` cannot be called.
        SiteError: when transformed, if `fn` has no marks or was differentiated already.
    """
    if not callable(fn):
        raise ArgumentError(f"from_checkpoint_names takes a function, got {type(fn).__name__}.")
    return _CheckpointNames(chosen_sites(sites), hold(fn))


class _CheckpointNames(Subject):
    fn: Any

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return unhold(self.fn)(*args, **kwargs)

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._plain(args, kwargs)

    def _marks_in(self, closed_jaxpr: Any, recorder: Recorder) -> Any:
        def change(eqn: Any) -> tuple[list[Any], dict[Any, Any]]:
            if eqn.primitive is not jp.name_p:
                return [eqn], {}
            recorder.marks.append(Mark((eqn.params["name"],), "", "", "", len(recorder.marks)))
            return with_site(eqn, raw_name(len(recorder.marks) - 1))

        _refuse_differentiated(closed_jaxpr.jaxpr)
        marked = rewrite(closed_jaxpr, change)
        if not recorder.marks:
            raise SiteError(
                "this function marks nothing with jax.ad_checkpoint.checkpoint_name, so it has no sites here. For the "
                "modules of a Flax or Equinox model use from_linen, from_nnx or from_equinox; or put mechjax.site in."
            )
        return marked

    def _names(self, recorder: Recorder, table: dict[str, SiteInfo]) -> dict[int, Name]:
        return name_occurrences(recorder, table)


def _refuse_differentiated(jaxpr: Any, inside: bool = False) -> None:
    """Refuse marks among equations that differentiation made, which the stack of their names tells."""
    for eqn in jaxpr.eqns:
        differentiated = inside or "jvp(" in str(eqn.source_info.name_stack)
        if eqn.primitive is jp.name_p and differentiated:
            raise SiteError(
                f"`{eqn.params['name']}` is marked by checkpoint_name in a function that is differentiated already, "
                "where an edit would not reach the derivative. Wrap it first: jax.grad(from_checkpoint_names(fn))."
            )
        for inner in inner_jaxprs(eqn):
            _refuse_differentiated(getattr(inner, "jaxpr", inner), differentiated)
