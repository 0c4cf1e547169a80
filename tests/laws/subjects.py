"""Functions to try the laws on: one that is no transformer, in every nesting of JAX's combinators; and a decoder."""

from dataclasses import dataclass
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
from jax import lax

from mechjax.transform import site

LAYERS, POS, UNIT = 4, 3, 2
AXES = ("pos", "unit")
SITES = ("pre", "hidden", "post")  # in the order in which a layer runs them

WEIGHTS = 0.7 * jax.random.normal(jax.random.key(0), (LAYERS, UNIT, UNIT))
BATCH = jax.random.normal(jax.random.key(1), (2, POS, UNIT))


def block(named, x, w, layer):
    """One layer; positions do not mix, so edits at one leave the others alone."""
    x = named(x, "pre", layer)
    hidden = named(jnp.tanh(x @ w), "hidden", layer)
    return named(x + hidden, "post", layer)


def _cond(run):
    return lambda x, w, i: lax.cond(jnp.isfinite(x).all(), run, lambda x, w, i: x, x, w, i)


def _custom_jvp(run):
    wrapped = jax.custom_jvp(run)
    wrapped.defjvp(lambda primals, tangents: jax.jvp(run, primals, tangents))
    return wrapped


def _custom_vjp(run):
    wrapped = jax.custom_vjp(run)

    def forward(x, w, i):
        return run(x, w, i), (x, w, i)

    def backward(saved, ct):
        x, w, i = saved
        return *jax.vjp(lambda x, w: run(x, w, i), x, w)[1](ct), None

    wrapped.defvjp(forward, backward)
    return wrapped


BODIES = {
    "plain": lambda run: run,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "cond": _cond,
    "custom_jvp": _custom_jvp,
    "custom_vjp": _custom_vjp,
}


def _unrolled(run, x, ws):
    for i in range(LAYERS):
        x = run(x, ws[i], i)
    return x


def _scanned(run, x, ws):
    return lax.scan(lambda x, wi: (run(x, *wi), None), x, (ws, jnp.arange(LAYERS)))[0]


def _counted(run, x, ws):  # no layer given: the loop's counter is the layer
    return lax.scan(lambda x, w: (run(x, w, None), None), x, ws)[0]


def _nested(run, x, ws):
    def outer(x, wi):
        return lax.scan(lambda x, wi: (run(x, *wi), None), x, wi)[0], None

    half = (2, LAYERS // 2)
    return lax.scan(outer, x, (ws.reshape(*half, UNIT, UNIT), jnp.arange(LAYERS).reshape(half)))[0]


def _nested_counted(run, x, ws):
    def outer(x, w):
        return lax.scan(lambda x, w: (run(x, w, None), None), x, w)[0], None

    return lax.scan(outer, x, ws.reshape(2, LAYERS // 2, UNIT, UNIT))[0]


def _while(run, x, ws):
    return lax.while_loop(
        lambda s: s[0] < LAYERS, lambda s: (s[0] + 1, run(s[1], ws[s[0]], s[0])), (jnp.int32(0), x)
    )[1]


def _pairs(run, x, ws):  # a pattern of two blocks per step
    def two(x, wi):
        w, i = wi
        return run(run(x, w[0], 2 * i), w[1], 2 * i + 1), None

    return lax.scan(two, x, (ws.reshape(LAYERS // 2, 2, UNIT, UNIT), jnp.arange(LAYERS // 2)))[0]


def _segments(run, x, ws):
    for part in (slice(0, 1), slice(1, LAYERS)):
        x = lax.scan(lambda x, wi: (run(x, *wi), None), x, (ws[part], jnp.arange(LAYERS)[part]))[0]
    return x


def _resumed(run, x, ws, start=0):
    def step(x, wi):
        return lax.cond(wi[1] >= start, lambda x: run(x, *wi), lambda x: x, x), None

    return lax.scan(step, x, (ws, jnp.arange(LAYERS)))[0]


LAYOUTS = {
    "unrolled": _unrolled, "scanned": _scanned, "counted": _counted, "nested": _nested, "while": _while,
    "nested counted": _nested_counted, "pairs": _pairs, "segments": _segments, "resumed": _resumed,
}  # fmt: skip
COUNTED = frozenset({"counted", "nested counted"})


@dataclass(frozen=True)
class Nesting:
    layout: str = "scanned"
    bodies: tuple[str, ...] = ("plain",)
    outer: str = "plain"

    @property
    def differentiable(self):
        return self.layout != "while"

    @property
    def has_custom_rule(self):
        return bool({"custom_jvp", "custom_vjp"} & set(self.bodies))


@st.composite
def nestings(draw, outers=("plain", "jit"), layouts=tuple(LAYOUTS)):
    layout = draw(st.sampled_from(layouts))
    # A function with its own derivative rule needs its layer as an argument.
    bodies = [b for b in BODIES if layout not in COUNTED or not b.startswith("custom")]
    return Nesting(layout, tuple(draw(st.lists(st.sampled_from(bodies), min_size=1, max_size=2))),
                   draw(st.sampled_from(outers)))  # fmt: skip


def build(nesting=None, tagged=True, spec=None):
    """A fresh function `f(x [pos, unit]) -> [pos, unit]` with sites, in the nesting given."""
    nesting = Nesting() if nesting is None else nesting
    counted = nesting.layout in COUNTED

    def named(x, name, layer):
        if not tagged:
            return x
        given = {} if counted else {"layer": layer, "layers": LAYERS}
        return site(x, name, axes=AXES, spec=spec, **given)

    run = partial(block, named)
    if counted:
        for body in nesting.bodies:
            run = _without_layer(BODIES[body], run)
    else:
        for body in nesting.bodies:
            run = BODIES[body](run)

    def f(x):
        y = LAYOUTS[nesting.layout](run, x, WEIGHTS.astype(x.dtype))
        return (site(y * 2, "out", axes=AXES, spec=spec) if tagged else y * 2) + 1

    return jax.jit(f) if nesting.outer == "jit" else f


def _without_layer(wrap, run):
    inner = wrap(lambda x, w, _: run(x, w, None))
    return lambda x, w, i: inner(x, w, jnp.int32(0))


def reference(x, edits=()):
    """The same by hand: a dictionary of every activation, with `edits[name, layer](value)` applied."""
    edits, acts = dict(edits), {}

    def named(x, name, layer):
        x = edits.get((name, layer), lambda v: v)(x)
        acts[name, layer] = x
        return x

    for i in range(LAYERS):
        x = block(named, x, WEIGHTS[i], i)
    acts["final"] = named(x * 2, "out", None) + 1
    return acts
