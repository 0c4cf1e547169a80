"""Law 7: nothing is silent. Every way in which an edit can miss, found while the transform was designed, is a test."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mechjax as mj
from mechjax.base.errors import SiteError
from tests.laws.subjects import BATCH, LAYERS, UNIT, WEIGHTS, Nesting, _resumed, block, build
from tests.tolerances import TOL

X = BATCH[0]


def resumed(start):
    def named(x, name, layer):
        return mj.site(x, name, layer=layer, layers=LAYERS, axes=("pos", "unit"))

    return lambda x: _resumed(lambda x, w, i: block(named, x, w, i), x, WEIGHTS, start)


def branching(x, n=1):
    """A site in a branch that is taken where the sum is positive."""
    return lax.cond(x.sum() > 0, lambda x: mj.site(x, "inner", axes=("unit",)) * 2, lambda x: x, x)


def test_miss__before_a_resumed_start__poisons_output_and_captures():
    run = jax.jit(
        lambda start, layer: mj.capture(
            mj.intervene(resumed(start), [mj.zero("hidden", layer=layer)]), "post"
        )(X)
    )
    out, acts = run(2, 1)
    assert np.isnan(out).all() and np.isnan(acts["post"]).all()
    out, acts = run(2, 2)
    assert np.isfinite(out).all()
    assert np.isnan(acts["post"][:2]).all() and np.isfinite(acts["post"][2:]).all()
    assert acts.ran["post"].tolist() == [False, False, True, True]


def test_miss__branch_not_taken__poisons():
    edited = mj.intervene(branching, [mj.zero("inner")])
    np.testing.assert_array_equal(edited(jnp.ones(2)), 0)
    assert np.isnan(edited(-jnp.ones(2))).all()


def test_miss__branch_under_vmap__poisons_inside_and_is_a_select_outside():
    xs = jnp.stack([jnp.ones(2), -jnp.ones(2)])
    edit = [mj.add("inner", 1.0)]
    inside = jax.vmap(mj.intervene(branching, edit))(xs)
    np.testing.assert_array_equal(inside, [[4, 4], [np.nan, np.nan]])
    # vmap has already made the branch a select, so that every example runs it: the one that did not take it keeps its
    # own value, and no miss can be seen. Documented: edit inside the vmap where that matters.
    outside = mj.intervene(jax.vmap(branching), edit)(xs)
    np.testing.assert_array_equal(outside, [[4, 4], [-1, -1]])


def test_miss__past_the_end_of_a_while__poisons():
    def f(x, n):
        def step(s):
            return s[0] + 1, mj.site(s[1] + 1, "h", layer=s[0], layers=LAYERS, axes=("unit",))

        return lax.while_loop(lambda s: s[0] < n, step, (0, x))[1]

    edit = [mj.zero("h", layer=3)]
    assert np.isnan(mj.intervene(f, edit)(jnp.ones(2), 3)).all()
    np.testing.assert_array_equal(mj.intervene(f, edit)(jnp.ones(2), 4), 0)


def test_miss__integer_output__raises():
    edited = mj.intervene(lambda x: branching(x).argmax(), [mj.zero("inner")])
    assert edited(jnp.ones(2)) == 0
    with pytest.raises(Exception, match="an edit never took hold"):
        jax.block_until_ready(edited(-jnp.ones(2)))


def test_miss__gradients_of_value_and_parameters_are_nan_not_zero():
    @jax.jit
    def grads(layer):
        def loss(value, weight):
            f = mj.intervene(lambda x: build()(x * weight), [mj.replace("hidden", value, layer=layer)])
            return (f(X) ** 2).sum()

        return jax.grad(loss, (0, 1))(jnp.ones(UNIT), 1.0)

    assert all(np.isfinite(g).all() for g in grads(1))
    assert all(np.isnan(g).all() for g in grads(9))


def test_miss__position_as_data__poisons_and_concrete__raises():
    f = build()
    with pytest.raises(SiteError, match="pos 7 is out of range; site `hidden` has 3"):
        mj.intervene(f, [mj.zero("hidden", pos=7)])(X)
    run = jax.jit(lambda pos: mj.intervene(f, [mj.zero("hidden", pos=pos)])(X))
    assert np.isnan(run(7)).all() and np.isfinite(run(-3)).all()


@pytest.mark.parametrize("on_miss", ["raise", "allow"])
def test_miss__on_miss__raises_or_is_allowed(on_miss):
    edited = mj.intervene(branching, [mj.zero("inner", on_miss=on_miss)])
    if on_miss == "allow":
        np.testing.assert_array_equal(edited(-jnp.ones(2)), -1)
    else:
        with pytest.raises(Exception, match="an edit never took hold"):
            jax.block_until_ready(edited(-jnp.ones(2)))


def test_miss__list_of_layers__each_must_be_met():
    run = jax.jit(lambda layers: mj.intervene(resumed(2), [mj.zero("hidden", layer=layers)])(X))
    assert np.isfinite(run(jnp.array([2, 3]))).all()
    assert np.isnan(run(jnp.array([1, 3]))).all()
    mask = jnp.array([False, False, True, False])
    assert np.isfinite(run(mask)).all()


def test_miss__one_bad_cell_of_a_sweep__only_that_cell_is_nan():
    layers = jnp.array([0, 1, 9])
    out = jax.vmap(lambda layer: mj.intervene(build(), [mj.zero("hidden", layer=layer)])(X))(layers)
    assert np.isfinite(out[:2]).all() and np.isnan(out[2]).all()


def test_twice__same_name_outside_and_in_a_branch__raises():
    def f(x):
        return branching(mj.site(x, "inner", axes=("unit",)))

    with pytest.raises(SiteError, match="site `inner` occurs 2 times without a layer"):
        mj.capture(f, "inner")(jnp.ones(2))


def test_twice__both_branches_of_a_cond__is_one_activation():
    def f(x):
        return lax.cond(x.sum() > 0, lambda x: mj.site(x * 2, "h"), lambda x: mj.site(x * 3, "h"), x)

    for x in (jnp.ones(2), -jnp.ones(2)):
        out, acts = mj.capture(f, "h")(x)
        np.testing.assert_array_equal(acts["h"], out)


def test_twice__constant_layer__raises_and_traced_layer__is_nan():
    def constant(x):
        for layer in (0, 1, 1):
            x = mj.site(x + 1, "h", layer=layer, layers=2)
        return x

    with pytest.raises(SiteError, match="occurs 2 times at layer 1"):
        mj.capture(constant, "h")(jnp.ones(2))

    def traced(x):
        return lax.scan(lambda x, i: (mj.site(x + 1, "h", layer=i, layers=2), None), x, jnp.array([0, 1, 1]))[
            0
        ]

    _, acts = mj.capture(traced, "h")(jnp.ones(2))
    np.testing.assert_array_equal(acts["h"], [[2, 2], [np.nan, np.nan]])


def test_order__intervene_of_grad__raises_unless_straight_through():
    f = build()
    grad = jax.grad(lambda x: (f(x) ** 2).sum())
    with pytest.raises(SiteError, match=r"Write grad\(intervene\(f, edits\)\)"):
        mj.intervene(grad, [mj.scale("hidden", 0.5)])(X)
    assert np.isfinite(mj.intervene(grad, [mj.scale("hidden", 0.5, straight_through=True)])(X)).all()


def test_gradient__unrelated_site__is_zero_and_of_tokens__exists():
    def f(tokens):
        x = mj.site(jnp.take(WEIGHTS[0], tokens, axis=0), "embed", axes=("pos", "unit"))
        unused = mj.site(x * 3, "unused", axes=("pos", "unit"))
        return x * 2 + 0 * jax.lax.stop_gradient(unused)

    value, grads = mj.value_and_grad_at(f, lambda y: y.sum(), ["embed", "unused"])(jnp.array([0, 1, 1]))
    np.testing.assert_array_equal(grads["embed"], np.full((3, UNIT), 2.0))
    np.testing.assert_array_equal(grads["unused"], 0)
    np.testing.assert_allclose(value, f(jnp.array([0, 1, 1])).sum(), **TOL["float32", "law"])


def test_gradient__a_site_that_nothing_reads__is_zero_where_it_ran():
    def f(x):
        mj.site(x * 3, "unread", axes=("unit",))
        for layer in range(3):  # the parts beside the stream are read at layer 1 alone
            beside = mj.site(x * 2, "beside", layer=layer, layers=3, axes=("unit",))
            x = x + 1 + (beside if layer == 1 else 0)

        def branch(x):
            mj.site(x * 5, "inner", axes=("unit",))
            return x

        return lax.cond(x.sum() > 0, branch, lambda x: x, x)

    grads_of = mj.value_and_grad_at(f, jnp.sum, ["unread", "beside", "inner"])
    value, grads = grads_of(jnp.ones(2))
    np.testing.assert_allclose(value, f(jnp.ones(2)).sum(), **TOL["float32", "law"])
    np.testing.assert_array_equal(grads["unread"], [0, 0])
    np.testing.assert_array_equal(grads["beside"], [[0, 0], [1, 1], [0, 0]])
    np.testing.assert_array_equal(grads["inner"], [0, 0])
    assert grads.ran["beside"].all() and grads.ran["inner"]
    _, grads = grads_of(jnp.full(2, -10.0))
    assert np.isnan(grads["inner"]).all() and not grads.ran["inner"] and grads.ran["unread"]


@pytest.mark.filterwarnings("ignore:a site inside a function with its own derivative rule")
@pytest.mark.parametrize("body", ["plain", "remat", "custom_vjp", "custom_jvp", "cond"])
@pytest.mark.parametrize("layout", ["unrolled", "scanned"])
def test_gradient__every_nesting__equals_a_perturbation(layout, body):
    f = build(Nesting(layout, (body,)))
    _, grads = mj.value_and_grad_at(f, lambda y: (y**2).sum(), ["hidden"])(X)

    def perturbed(eps):
        return (mj.intervene(f, [mj.add("hidden", eps, per_layer=True)])(X) ** 2).sum()

    expected = jax.grad(perturbed)(jnp.zeros((LAYERS, *X.shape)))
    np.testing.assert_allclose(grads["hidden"], expected, **TOL["float32", "gradient"])


def test_custom_rule__edited_inside_and_differentiated__warns():
    f = build(Nesting("scanned", ("custom_vjp",)))
    edited = mj.intervene(f, [mj.zero("hidden", layer=0)])
    edited(X)  # no derivative, no warning
    with pytest.warns(UserWarning, match="its own derivative rule"):
        jax.grad(lambda x: edited(x).sum())(X)
