"""Changing the equations of a program in place of running it again: types stay, so every combinator stays as it is."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex

from mechjax.transform import site
from mechjax.transform.site import site_p

# What becomes of an equation: the equations that stand for it, and variables that others take the place of.
Change = Callable[[Any], tuple[list[Any], dict[Any, Any]]]


def rewrite(closed_jaxpr: Any, change: Change) -> Any:
    """The program with every equation changed, at any depth; those inside an equation before the equation itself."""
    return closed_jaxpr.replace(jaxpr=_rewrite(closed_jaxpr.jaxpr, change))


def _rewrite(jaxpr: Any, change: Change) -> Any:
    instead: dict[Any, Any] = {}

    def current(v: Any) -> Any:
        return v if isinstance(v, jex.Literal) else instead.get(v, v)

    eqns = []
    for eqn in jaxpr.eqns:
        params = {key: _inside(value, change) for key, value in eqn.params.items()}
        after, swapped = change(eqn.replace(invars=[current(v) for v in eqn.invars], params=params))
        eqns += after
        instead |= swapped
    return jaxpr.replace(eqns=eqns, outvars=[current(v) for v in jaxpr.outvars])


def _inside(value: Any, change: Change) -> Any:
    if isinstance(value, jex.ClosedJaxpr):
        return rewrite(value, change)
    if isinstance(value, jex.Jaxpr):
        return _rewrite(value, change)
    if isinstance(value, (tuple, list)) and any(
        isinstance(item, (jex.Jaxpr, jex.ClosedJaxpr)) for item in value
    ):
        return type(value)(_inside(item, change) for item in value)
    return value


def without(eqn: Any) -> tuple[list[Any], dict[Any, Any]]:
    """The change that leaves out an equation that is an identity."""
    return [], {eqn.outvars[0]: eqn.invars[0]}


def with_site(eqn: Any, name: str) -> tuple[list[Any], dict[Any, Any]]:
    """The change that puts a site on the one result of an equation."""
    (out,) = eqn.outvars
    tagged = copy.copy(out)  # variables are compared by identity
    params = {
        "name": name,
        "kind": "primal",
        "bdims": (),
        "layers": None,
        "axes": (),
        "spec": None,
        "having": None,
        "also": (),
        "starts": (),
        "along": None,
    }
    return [eqn, eqn.replace(primitive=site_p, invars=[out], outvars=[tagged], params=params)], {out: tagged}


@functools.lru_cache(maxsize=4096)
def layer_operand(layer: int) -> Any:
    """A constant layer, as the second operand of a site's equation."""
    traced = jax.make_jaxpr(lambda x: site(x, "", layer=layer, layers=layer + 1))(0.0)
    return traced.jaxpr.eqns[0].invars[1]
