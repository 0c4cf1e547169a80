"""Sites under `vmap`, their mapped axes as ordinary ones, so that edits and captures see all examples at once.

What is written for one example (as Equinox has it) runs under `jax.vmap`, and an edit there sees one example's value.
A method that puts in what another run had in each example, at some positions, needs all of them.
"""

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from mechjax.base.errors import SiteError
from mechjax.interop.rewrite import rewrite
from mechjax.transform.context import tracing
from mechjax.transform.site import site_p
from mechjax.transform.static import hold, unhold


class Unmapped(eqx.Module):
    """A function whose sites have their mapped axes in front, before all others, the outermost first."""

    fn: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        fn = unhold(self.fn)
        if not tracing():
            return fn(*args, **kwargs)
        closed, shapes, fixed = eqx.filter_make_jaxpr(lambda args, kwargs: fn(*args, **kwargs))(args, kwargs)
        return called(unmapped_sites(closed), shapes, fixed, args, kwargs)


def unmapped(fn: Callable[..., Any]) -> Unmapped:
    """`fn` with the mapped axes of its sites as ordinary ones."""
    return Unmapped(hold(fn))


def unmapped_sites(closed_jaxpr: Any) -> Any:
    """The program with the mapped axes of its sites as ordinary ones.

    Raises:
        SiteError: A site with more names of axes than it has axes.
    """
    return rewrite(closed_jaxpr, _unmapped)


def called(closed_jaxpr: Any, shapes: Any, fixed: Any, args: Any, kwargs: Any) -> Any:
    """What a program gives that `equinox.filter_make_jaxpr` made of a function of `args` and `kwargs`."""
    outs = jex.jaxpr_as_fun(closed_jaxpr)(*jax.tree.leaves(eqx.filter((args, kwargs), eqx.is_array)))
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(shapes), outs), fixed)


def _unmapped(eqn: Any) -> tuple[list[Any], dict[Any, Any]]:
    if eqn.primitive is not site_p:
        return [eqn], {}
    params, aval = eqn.params, eqn.outvars[0].aval
    if any(layer is not None for _, layer in params["bdims"]):  # layers side by side: no axis of the value
        return [eqn], {}
    if len(params["axes"]) > aval.ndim:
        raise SiteError(
            f"site `{params['name']}` is given the axes {params['axes']}, and holds an array of shape {aval.shape}: "
            "name at most as many of its last axes as it has."
        )
    left, order = list(range(aval.ndim)), []
    for dim, _ in reversed(params["bdims"]):  # the outermost map was recorded last
        order.append(left.pop(dim))
    order += left
    plain = {**params, "bdims": ()}
    if order == list(range(aval.ndim)):
        return [eqn.replace(params=plain)], {}

    def moved(x: Any, *layer: Any) -> Any:
        back = tuple(int(i) for i in np.argsort(order))
        return jnp.transpose(site_p.bind(jnp.transpose(x, order), *layer, **plain), back)

    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    return _in_place_of(eqn, jax.make_jaxpr(moved)(*shapes).jaxpr), {}


def _in_place_of(eqn: Any, jaxpr: Any) -> list[Any]:
    """The equations of a program, on what an equation takes and gives."""
    now = dict(zip([*jaxpr.invars, *jaxpr.outvars], [*eqn.invars, *eqn.outvars], strict=True))
    for inner in jaxpr.eqns:
        now |= {v: copy.copy(v) for v in inner.outvars if v not in now}
    current = lambda v: v if isinstance(v, jex.Literal) else now[v]
    return [
        inner.replace(invars=[current(v) for v in inner.invars], outvars=[now[v] for v in inner.outvars])
        for inner in jaxpr.eqns
    ]
