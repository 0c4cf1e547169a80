"""Sites that go by other names: wherever a name is taken, and in what comes out."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_array_equal

import mechjax as mj
from mechjax.base.errors import SiteError

X = jnp.arange(10.0).reshape(2, 5)


def tower(x):
    def layer(x, i):
        y = mj.site(
            2 * x, "grown", layer=i, layers=3, axes=("unit",), also=("body.{}.grow.output", "g.{}.output")
        )
        return mj.site(x + y, "h", layer=i, layers=3, axes=("unit",)), None

    return mj.site(lax.scan(layer, x, jnp.arange(3))[0], "out", axes=("unit",), also=("head.output",))


def test_capture__by_another_name__is_the_site_and_answers_to_both():
    _, acts = mj.capture(tower, ["body.2.grow.output", "body[0].grow.output[0]", "head.output"])(X)
    assert (set(acts), acts.layers["grown"]) == ({"grown", "out"}, (2, 0))
    assert_array_equal(acts["body.2.grow.output"], acts["grown"][0])
    assert_array_equal(acts["g.0.output"], 2 * X)
    assert "g.0.output" in acts
    assert "g.1.output" not in acts
    assert "h.output" not in acts


def test_edits_and_gradients__by_another_name__are_the_sites():
    _, acts = mj.capture(tower, "grown")(X)
    for value in (7.0, acts):
        there = mj.intervene(tower, mj.replace("g.1.output", value))(X)
        assert_array_equal(there, mj.intervene(tower, mj.replace("grown", value, layer=1))(X))
    total, grads = mj.value_and_grad_at(tower, lambda y: y.sum(-1), ["body.1.grow.output", "head.output"])(X)
    assert_array_equal(total, tower(X).sum(-1))
    assert_array_equal(grads["grown"], np.full((1, 2, 5), 3.0))
    assert_array_equal(grads["head.output"], np.ones((2, 5)))
    assert mj.list_sites(tower, X)["g.{}.output"].name == "grown"


def test_names__of_nothing_or_of_one_site_twice__teach():
    with pytest.raises(
        SiteError, match=r"no site is named `body.\{\}.grwo.output`. Did you mean `body.\{\}.grow.output`"
    ):
        mj.capture(tower, "body.1.grwo.output")(X)
    with pytest.raises(SiteError, match=r"captured twice: .'grown'."):
        mj.capture(tower, ["grown", "g.{}.output"])(X)
    with pytest.raises(SiteError, match=r"`g.1.output` already says layer 1, but layer=2"):
        mj.zero("g.1.output", layer=2)
