"""Sites that only some layers have: stacks over those, edits of those, and what is said of the others."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ShapeError, SiteError
from mechjax.transform.site import site
from tests.tolerances import TOL

LAYERS, EVEN = 6, (0, 2, 4)
X = jnp.arange(1.0, 4.0)


def f(x):
    """Doubles and names "wide" in even layers, adds one in odd ones."""

    def two(x, i):
        even, odd = 2 * i, 2 * i + 1
        x = site(2 * x, "wide", layer=even, layers=LAYERS, axes=("d",), having=EVEN)
        return site(x + 1, "narrow", layer=odd, layers=LAYERS, axes=("d",), having=(1, 3, 5)), None

    return lax.scan(two, x, jnp.arange(LAYERS // 2))[0]


def test_capture__a_site_of_some_layers__stacks_over_those_and_says_which():
    y, acts = mj.capture(f, ["wide", "narrow"])(X)
    assert acts.layers == {"wide": EVEN, "narrow": (1, 3, 5)}
    assert_array_equal(acts["wide"], jnp.stack([2 * X, 4 * X + 2, 8 * X + 6]))
    assert_array_equal(acts["narrow"][-1], y)
    assert acts.ran["wide"].all()
    some = mj.capture(f, ["wide"], layers=[4])(X)[1]
    assert some.layers == {"wide": (4,)}
    assert_array_equal(some["wide"][0], acts["wide"][2])


def test_listing__a_site_of_some_layers__says_how_many():
    assert "3 of 6" in str(mj.list_sites(f, X))


def test_edits__of_a_record_or_per_layer__reach_the_layers_that_have_the_site():
    _, other = mj.capture(f, ["wide"])(X + 1)
    for edit in (mj.replace("wide", other), mj.replace("wide", other["wide"], per_layer=True)):
        _, edited = mj.capture(mj.intervene(f, [edit]), ["wide"])(X)
        assert_allclose(edited["wide"], other["wide"], **TOL["float32", "law"])
    one = mj.intervene(f, [mj.replace("wide", other["wide"][1], layer=2)])(X)
    assert_allclose(one, f(X + 1), **TOL["float32", "law"])
    assert_allclose(mj.intervene(f, [mj.add("wide", 1.0)])(X), f(X) + 7, **TOL["float32", "law"])


def test_gradient__a_site_of_some_layers__stacks_over_those():
    _, grads = mj.value_and_grad_at(f, jnp.sum, ["wide"])(X)
    assert grads.layers == {"wide": EVEN}
    assert_allclose(grads["wide"], jnp.array([4.0, 2.0, 1.0])[:, None] * jnp.ones(3), **TOL["float32", "law"])


@pytest.mark.parametrize(
    "ask",
    [
        lambda: mj.capture(f, ["wide"], layers=[0, 1])(X),
        lambda: mj.intervene(f, [mj.zero("wide", layer=1)])(X),
        lambda: mj.intervene(f, [mj.zero("wide", layer=[0, 1])])(X),
        lambda: mj.intervene(f, [mj.zero("wide", layer=jnp.array([1, 1, 0, 0, 0, 0], bool))])(X),
        lambda: mj.intervene(f, [mj.zero("wide", layer=-5)])(X),
    ],
)
def test_layer_without_the_site__asked_for__is_refused(ask):
    with pytest.raises(SiteError, match=r"layer 1 has no site `wide`; layers 0, 2, 4 have"):
        ask()


def test_layer_without_the_site__as_data__is_a_miss():
    edited = jax.jit(lambda layer: mj.intervene(f, [mj.zero("wide", layer=layer)])(X))
    assert not jnp.isnan(edited(2)).any()
    assert jnp.isnan(edited(1)).all()


def test_value_per_layer__of_all_layers__is_refused():
    with pytest.raises(ShapeError, match="site `wide` has 3 layers"):
        mj.intervene(f, [mj.replace("wide", jnp.ones((6, 3)), per_layer=True)])(X)
