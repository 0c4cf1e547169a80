"""A subject: a callable of another library whose activations are sites while a transform looks."""

import abc
from typing import Any

import equinox as eqx
import jax

from mechjax.base.errors import JitError, SiteError
from mechjax.interop.marks import Recorder, mark_number, recording
from mechjax.interop.naming import Chosen, Name, name_modules, settle
from mechjax.interop.rewrite import layer_operand, rewrite, without
from mechjax.interop.unmapped import called, unmapped_sites
from mechjax.transform.context import tracing
from mechjax.transform.site import site_p
from mechjax.transform.table import SiteInfo, site_table


class Subject(eqx.Module):
    """A model of another library, as a pure function of its arguments; its arrays are leaves.

    Without a transform around it, it is the model's own program, to the last equation. While `capture`, `intervene`,
    `value_and_grad_at` or `list_sites` trace it, the arrays that its modules take and return are sites, named as
    `mechjax.interop.naming` says. A module called several times has `call_0`, `call_1`, ... in the name. Axes that the
    model itself maps over (`jax.vmap` inside it) are ordinary axes of a site, in front of the others.
    """

    chosen: tuple[Chosen, ...] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model.

        Raises:
            SiteError: when transformed, where `sites=` names what the model does not have.
        """
        return self._named(args, kwargs) if tracing() else self._plain(args, kwargs)

    def __hash__(self) -> int:
        raise JitError(
            f"a {type(self).__name__} holds arrays, so jax.jit(subject) would bake them in as constants. Use "
            "equinox.filter_jit(subject), or pass it as an argument: jax.jit(lambda f, x: f(x))(subject, x)."
        )

    def batched(self) -> "Subject":
        """The subject of many examples at once, for a model that is written for one, as Equinox has it.

        `subject.batched()(x)` is `jax.vmap(subject)(x)`, and examples are the first axis of every site, so that an edit
        may differ between them: what patching needs. Under `jax.vmap(subject)` itself an edit sees one example.
        """
        return _Batched(self.chosen, self)

    @abc.abstractmethod
    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own call."""

    @abc.abstractmethod
    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same, with activations marked."""

    def _marks_in(self, closed_jaxpr: Any, recorder: Recorder) -> Any:
        """The program with the marks that are found only in it."""
        return closed_jaxpr

    def _names(self, recorder: Recorder, table: dict[str, SiteInfo]) -> dict[int, Name]:
        return name_modules(recorder, table)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Trace with marks, name those that are in the program, and run it."""
        recorder = Recorder()

        def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with recording(recorder):
                return self._marked(args, kwargs)

        closed, shapes, fixed = eqx.filter_make_jaxpr(run)(args, kwargs)
        closed = self._marks_in(closed, recorder)
        names = settle(self._names(recorder, _table(closed)), self.chosen)
        named = unmapped_sites(rewrite(closed, lambda eqn: _renamed(eqn, names)))
        return called(named, shapes, fixed, args, kwargs)


class _Batched(Subject):
    """A subject under `vmap`; what it takes is mapped over its first axis, named arguments too."""

    one: Subject

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return jax.vmap(self.one._plain)(args, kwargs)

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return jax.vmap(self.one._marked)(args, kwargs)

    def _marks_in(self, closed_jaxpr: Any, recorder: Recorder) -> Any:
        return self.one._marks_in(closed_jaxpr, recorder)

    def _names(self, recorder: Recorder, table: dict[str, SiteInfo]) -> dict[int, Name]:
        return self.one._names(recorder, table)


def _table(closed_jaxpr: Any) -> dict[str, SiteInfo]:
    try:
        return site_table(closed_jaxpr)
    except SiteError as error:
        if mark_number(str(error).partition("`")[2].partition("`")[0]) is None:
            raise
        raise SiteError(
            "a module of this model is traced once and run several times (a jaxpr that is evaluated again), so its "
            "calls cannot be told apart. Call the module each time, or put the calls in a scan."
        ) from None


def _renamed(eqn: Any, names: dict[int, Name]) -> tuple[list[Any], dict[Any, Any]]:
    i = mark_number(eqn.params["name"]) if eqn.primitive is site_p else None
    if i is None:
        return [eqn], {}
    if i not in names:
        return without(eqn)
    name = names[i]
    params = {
        **eqn.params,
        "name": name.name,
        "layers": name.layers,
        "axes": name.axes,
        "having": name.having,
    }
    operands = [] if name.layer is None else [layer_operand(name.layer)]
    return [eqn.replace(invars=[*eqn.invars, *operands], params=params)], {}
