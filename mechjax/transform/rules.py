"""How an equation with sites inside is emitted again: one rule per kind, all through public combinators.

Every rule has one shape: the state goes in beside the operands and comes out beside the results.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex
from jax.extend.core import primitives as jp
from jax.sharding import PartitionSpec

from mechjax.base.errors import SiteError
from mechjax.transform import compat
from mechjax.transform.request import Env, Request, State

Outcome = tuple[list[Any], State]


def _scan(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    params = eqn.params
    n_consts, n_carry = compat.scan_split(params)
    consts, carry, seq = xs[:n_consts], xs[n_consts : n_consts + n_carry], xs[n_consts + n_carry :]
    body, length = params["jaxpr"], params["length"]

    def step(carry: Any, each: Any) -> Any:
        (values, state), (i, rest) = carry, each
        inside = Env(env.numbers, i if env.counter is None else env.counter * length + i)
        outs, state = evaluate(request, body.jaxpr, body.consts, [*consts, *values, *rest], inside, state)
        return (outs[:n_carry], state), outs[n_carry:]

    (carry, state), ys = lax.scan(
        step, (carry, state), (jnp.arange(length, dtype=jnp.int32), seq),
        length=length, reverse=params["reverse"], unroll=params["unroll"],
    )  # fmt: skip
    return [*carry, *ys], state


def _while(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    params = eqn.params
    if request.touches(params["cond_jaxpr"]):
        raise SiteError(
            "a site that is asked for stands in the condition of a `while_loop`, where nothing can be edited or "
            "captured. Move it to the body."
        )
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts, init = xs[:n_cond], xs[n_cond : n_cond + n_body], xs[n_cond + n_body :]
    body = params["body_jaxpr"]

    def step(carry: Any) -> Any:
        i, values, state = carry
        outs, state = evaluate(
            request, body.jaxpr, body.consts, [*body_consts, *values], Env(env.numbers, i), state
        )
        return i + 1, outs, state

    def go_on(carry: Any) -> Any:
        return jex.jaxpr_as_fun(params["cond_jaxpr"])(*cond_consts, *carry[1])[0]

    _, outs, state = lax.while_loop(go_on, step, (jnp.int32(0), init, state))
    return outs, state


def _cond(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    branches = [
        lambda operands, state, b=b: evaluate(request, b.jaxpr, b.consts, operands, env, state)
        for b in eqn.params["branches"]
    ]
    return lax.switch(xs[0], branches, xs[1:], state)


def _jit(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    params = eqn.params
    inner = params["jaxpr"]

    def run(xs: Any, env: Env, state: State) -> Outcome:
        return evaluate(request, inner.jaxpr, inner.consts, xs, env, state)

    run.__name__ = params["name"]
    xs = _constrained(xs, params["in_shardings"])
    outs, state = jax.jit(run, inline=params["inline"], keep_unused=params["keep_unused"])(xs, env, state)
    return _constrained(outs, params["out_shardings"]), state


def _constrained(xs: list[Any], shardings: Any) -> list[Any]:
    """Explicit shardings of a nested `jit` become constraints."""
    return [
        x if compat.is_unspecified(s) else lax.with_sharding_constraint(x, s)
        for x, s in zip(xs, shardings, strict=True)
    ]


def _remat(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    params = eqn.params
    before, request.recomputing = request.recomputing, request.recomputing or params["differentiated"]

    def run(xs: Any, env: Env, state: State) -> Outcome:
        return evaluate(request, params["jaxpr"], (), xs, env, state)

    try:
        return jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(xs, env, state)
    finally:
        request.recomputing = before


def _call(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    inner = eqn.params.get("call_jaxpr") or eqn.params.get("fun_jaxpr")
    return evaluate(request, getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), xs, env, state)


def _custom(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    """The function itself is run; a rule written for the unedited function no longer holds, so JAX derives it."""

    def run(xs: Any, env: Env, state: State) -> Outcome:
        return _call(evaluate, request, eqn, xs, env, state)

    def derived(primals: Any, tangents: Any) -> Any:
        warnings.warn(
            f"a site inside a function with its own derivative rule ({eqn.primitive.name}) is edited or captured: the "
            "rule does not apply to the edited function, so its derivative is taken through its body. Put the site "
            "outside the function to keep the rule.",
            stacklevel=2,
        )
        return jax.jvp(run, primals, tangents)

    wrapped = jax.custom_jvp(run)
    wrapped.defjvp(derived)
    return wrapped(xs, env, state)


def _shard_map(evaluate: Any, request: Request, eqn: Any, xs: list[Any], env: Env, state: State) -> Outcome:
    params = eqn.params
    everywhere = PartitionSpec()
    buffers = {name: _buffer_spec(request, name, buffer.ndim) for name, buffer in state.buffers.items()}

    def run(xs: Any, env: Env, buffers: Any, rest: Any) -> Any:
        outs, after = evaluate(request, params["jaxpr"], (), xs, env, State(buffers, *rest))
        return outs, after.buffers, (after.counts, after.hits)

    outs, after, rest = jax.shard_map(
        run, mesh=params["mesh"], in_specs=(list(params["in_specs"]), everywhere, buffers, everywhere),
        out_specs=(list(params["out_specs"]), buffers, everywhere), check_vma=params["check_vma"],
        axis_names=set(compat.manual_axes(params)),
    )(xs, env, state.buffers, (state.counts, state.hits))  # fmt: skip
    return outs, State(after, *rest)


def _buffer_spec(request: Request, name: str, ndim: int) -> PartitionSpec:
    spec = request.sites[name].spec if request.sites[name].mapped is not None else None
    if spec is None:
        return PartitionSpec()
    return PartitionSpec(*(None,) * (ndim - len(spec)), *spec)


RULES: dict[str, Callable[..., Outcome]] = {
    jp.scan_p.name: _scan,
    jp.while_p.name: _while,
    jp.cond_p.name: _cond,
    compat.JIT_P.name: _jit,
    "remat": _remat,
    "remat2": _remat,
    "checkpoint": _remat,
    "closed_call": _call,
    "core_call": _call,
    "custom_jvp_call": _custom,
    "custom_vjp_call": _custom,
    "custom_vjp_call_jaxpr": _custom,
    "shard_map": _shard_map,
}


def rule_for(eqn: Any) -> Callable[..., Outcome]:
    """The rule of an equation.

    Raises:
        SiteError: there is none.
    """
    rule = RULES.get(eqn.primitive.name)
    if rule is None:
        raise SiteError(
            f"a site that is asked for stands inside `{eqn.primitive.name}`, which mechjax cannot open. Put it "
            f"outside; sites work inside {', '.join(sorted(RULES))}."
        )
    return rule
