"""The laws of the transform on a function that is no transformer, in drawn nestings, against a plain Python loop.

Every law is a function that raises where it does not hold; `test_controls` breaks one rule at a time and sees it raise.
"""

import equinox as eqx
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings

import mechjax as mj
from mechjax.base.errors import SiteError
from mechjax.transform.log import compile_log
from tests.laws.subjects import BATCH, LAYERS, LAYOUTS, POS, SITES, UNIT, Nesting, build, nestings, reference
from tests.tolerances import TOL

LAW, GRADIENT = TOL["float32", "law"], TOL["float32", "gradient"]
X = BATCH[0]
ORDER = [(name, layer) for layer in range(LAYERS) for name in SITES]
# Every example compiles a few programs, so there are few, the same each time, and failures are not shrunk.
few = settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])
places = st.tuples(st.sampled_from(SITES), st.integers(0, LAYERS - 1))
pytestmark = pytest.mark.filterwarnings("ignore:a site inside a function with its own derivative rule")


def close(actual, expected, tol=LAW):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), **tol)


def stacked(acts, name):
    return np.stack([acts[name, layer] for layer in range(LAYERS)])


def law_2(f, name, layer, pos):
    """An edit changes nothing upstream or beside it; no edits are no change."""
    assert mj.intervene(f, []) is f
    _, before = mj.capture(f, SITES)(X)
    edit = mj.add(name, 0.5, layer=layer, pos=pos)
    _, after = mj.capture(mj.intervene(f, [edit]), SITES)(X)
    beside = np.arange(POS) != pos % POS
    for other, at in ORDER:
        if (other, at) in ORDER[: ORDER.index((name, layer))]:
            close(after[other][at], before[other][at])
        close(after[other][at][beside], before[other][at][beside])
    changed = np.asarray(after[name][layer] - before[name][layer])
    close(changed[pos], np.full(UNIT, 0.5), GRADIENT)


def law_3(f, name, layer, dtype=jnp.float32):
    """Captured where a value was put is the value, broadcast, in the site's dtype."""
    value = np.linspace(-1, 1, UNIT)
    _, acts = mj.capture(mj.intervene(f, [mj.replace(name, value, layer=layer)]), name)(X.astype(dtype))
    assert acts[name].dtype == dtype
    close(
        acts[name][layer].astype(jnp.float32),
        np.broadcast_to(jnp.asarray(value, dtype), (POS, UNIT)).astype(np.float32),
    )


def law_4(f, first, second):
    """Edits at distinct sites commute, at one site they apply in order, nested inside out; a capture reads the result."""
    (name, layer), (other, at) = first, second
    e, g = mj.scale(name, 1.5, layer=layer), mj.add(other, 0.25, layer=at)
    both = mj.intervene(f, [e, g])(X)
    by_hand = {(other, at): lambda v: v + 0.25}
    by_hand[name, layer] = (lambda v: v * 1.5 + 0.25) if first == second else (lambda v: v * 1.5)
    close(both, reference(X, by_hand)["final"])
    if first != second:
        close(mj.intervene(f, [g, e])(X), both)
    close(mj.intervene(mj.intervene(f, [e]), [g])(X), both)
    out, outside = mj.capture(mj.intervene(f, [e, g]), SITES)(X)
    again, inside = mj.intervene(mj.capture(f, SITES), [e, g])(X)
    close(out, both)
    close(again, both)
    expected = reference(X, by_hand)
    for site in SITES:
        close(outside[site], stacked(expected, site))
        close(inside[site], stacked(expected, site))


def law_5_vmap(f, name, layer):
    """`intervene(vmap(f)) == vmap(intervene(f))`, captures too, for an edit that depends on the rank of what it sees."""
    edit = [mj.replace(name, np.arange(POS * UNIT).reshape(POS, UNIT) / 5, layer=layer, pos=[0, 2]),
            mj.apply("post", centered, layer=layer)]  # fmt: skip
    inside, acts_inside = jax.vmap(mj.capture(mj.intervene(f, edit), SITES))(BATCH)
    outside, acts_outside = mj.capture(mj.intervene(jax.vmap(f), edit), SITES)(BATCH)
    close(inside, outside)
    for site in SITES:  # they agree up to where the mapped axis stands
        close(np.moveaxis(acts_inside[site], 0, 1), acts_outside[site])
    last = mj.intervene(jax.vmap(f, in_axes=1, out_axes=1), edit)(np.moveaxis(BATCH, 0, 1))
    close(np.moveaxis(last, 1, 0), outside)


def centered(x, info):
    """What it does depends on the rank that it sees."""
    return x - x.mean(0)


def law_5_grad(f, name, layer):
    """`grad(intervene(f))` differentiates through the edit."""

    def loss(v, g):
        return (g([mj.replace(name, v, layer=layer, pos=1)]) ** 2).sum()

    value = jnp.array([0.3, -0.2])
    actual = jax.grad(loss)(value, lambda edits: mj.intervene(f, edits)(X))
    by_hand = jax.grad(
        lambda v: loss(v, lambda e: reference(X, {(name, layer): lambda a: a.at[1].set(v)})["final"])
    )(value)
    close(actual, by_hand, GRADIENT)
    through = jax.grad(lambda x: (mj.intervene(f, [mj.scale(name, 0.5, layer=layer)])(x) ** 2).sum())(X)
    expected = jax.grad(lambda x: (reference(x, {(name, layer): lambda a: a * 0.5})["final"] ** 2).sum())(X)
    close(through, expected, GRADIENT)


def law_6(f):
    """Every layout gives the same sites, shapes and values, captured whole, in part, and edited."""
    expected = reference(X)
    out, acts = mj.capture(f, [*SITES, "out"])(X)
    close(out, expected["final"])
    for site in SITES:
        assert acts[site].shape == (LAYERS, POS, UNIT)
        close(acts[site], stacked(expected, site))
    _, part = mj.capture(f, "hidden", layers=[3, 1], pos=-1)(X)
    close(part["hidden"], stacked(expected, "hidden")[[3, 1], -1])
    edits = [mj.zero("hidden", layer=2), mj.add("post", np.ones((LAYERS, UNIT)), per_layer=True)]
    by_hand = {("post", i): lambda v: v + 1 for i in range(LAYERS)} | {("hidden", 2): lambda v: v * 0}
    close(mj.intervene(f, edits)(X), reference(X, by_hand)["final"])


def law_7(f, layer):
    """A layer that does not exist raises where it can be seen, and poisons what comes out where it is data."""
    with pytest.raises(SiteError, match=f"layer {layer} is out of range"):
        mj.intervene(f, [mj.zero("hidden", layer=layer)])(X)

    @jax.jit
    def run(layer, value):
        edited = mj.intervene(f, [mj.replace("hidden", value, layer=layer)])
        return mj.capture(edited, "post")(X)

    out, acts = run(layer, jnp.ones(UNIT))
    assert np.isnan(out).all()
    assert np.isnan(acts["post"]).all()
    there, _ = run(1, jnp.ones(UNIT))
    assert np.isfinite(there).all()


def law_8(f):
    """New numbers never recompile, and a sweep is a `vmap` over edits."""
    compile_log(clear=True)

    def run(i):
        edit = mj.add("hidden", np.full(UNIT, i / 10), layer=i % LAYERS, pos=i % POS, strength=1 + i)
        return mj.intervene(f, [edit])(X)

    one_by_one = [run(i) for i in range(25)]
    assert len(compile_log()) == 1, compile_log()
    i = jnp.arange(25)
    edits = jax.vmap(lambda i, v, s: mj.add("hidden", v, layer=i % LAYERS, pos=i % POS, strength=s))(
        i, jnp.broadcast_to(i[:, None].astype(float) / 10, (25, UNIT)), 1.0 + i.astype(float)
    )
    swept = jax.vmap(lambda e: mj.intervene(f, [e])(X))(edits)
    close(swept, np.stack(one_by_one), TOL["float32", "layout"])


@few
@given(nestings(), places, st.sampled_from([-1, 0, 1]))
def test_law_2__edits_leave_the_rest_alone(nesting, place, pos):
    law_2(build(nesting), *place, pos)


@few
@given(nestings(), places, st.sampled_from([jnp.float32, jnp.bfloat16]))
def test_law_3__captured_is_what_was_put(nesting, place, dtype):
    law_3(build(nesting), *place, dtype)


@few
@given(nestings(), places, places)
def test_law_4__order_of_edits(nesting, first, second):
    law_4(build(nesting), first, second)


@few
@given(nestings(layouts=("unrolled", "scanned", "counted", "pairs", "while")), places)
def test_law_5__vmap_commutes(nesting, place):
    law_5_vmap(build(nesting), *place)


@few
@given(nestings(layouts=tuple(n for n in LAYOUTS if n != "while")), places)
def test_law_5__grad_differentiates_through_edits(nesting, place):
    law_5_grad(build(nesting), *place)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_law_6__layout_does_not_show(layout):
    law_6(build(Nesting(layout)))


@few
@given(
    nestings(layouts=("unrolled", "scanned", "counted", "while", "resumed")), st.sampled_from([LAYERS, 9, -9])
)
def test_law_7__a_missing_layer_is_not_silent(nesting, layer):
    law_7(build(nesting), layer)


@few
@given(nestings())
def test_law_8__numbers_are_data(nesting):
    law_8(build(nesting))


def test_law_8__user_jit_traces_once_for_100_numbers():
    f, traces = build(), []

    @eqx.filter_jit
    def run(edit):
        traces.append(edit)
        return mj.intervene(f, [edit])(X)

    for i in range(100):
        run(mj.replace("hidden", np.full(UNIT, i), layer=i % LAYERS, pos=i % POS))
    assert len(traces) == 1
