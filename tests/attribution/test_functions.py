"""Attribution of any function with sites: where it is exact, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.attribution import attribution_patch, integrated_gradients
from mechjax.base.errors import ArgumentError, ShapeError, SiteError
from mechjax.patching import activation_patch
from tests.tolerances import TOL

X, Y = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))  # (batch, pos, d)
W = jax.random.normal(jax.random.key(1), (5,))


def squared(x):
    """The square of a linear reading of a site: known gradients, known effects."""
    return ((mj.site(2 * x, "h", axes=("pos", "d")) @ W) ** 2).sum(1)


def itself(out):
    return out


def test_attribution_patch__of_a_square__is_its_closed_form():
    found = attribution_patch(squared, X, Y, itself, site="h", over=("pos",))
    a, b = 2 * X @ W, 2 * Y @ W
    assert_allclose(found.per_example, (2 * a * (a - b)).T, **TOL["float32", "gradient"])
    assert_allclose(found.clean, (a**2).sum(1), **TOL["float32", "law"])


def test_integrated_gradients__of_a_square__are_exact_with_one_midpoint():
    found = integrated_gradients(squared, X, Y, itself, site="h", over=("pos",), steps=1)
    a, b = 2 * X @ W, 2 * Y @ W
    assert_allclose(found.per_example, (a**2 - b**2).T, **TOL["float32", "gradient"])
    exact = activation_patch(squared, X, Y, itself, site="h", over=("pos",), mode="noise")
    assert float(found.compare(exact).pearson) > 0.9999
    assert (
        float(attribution_patch(squared, X, Y, itself, site="h", over=("pos",)).compare(exact).pearson)
        < 0.999
    )


@pytest.mark.parametrize(("ablation", "kept"), [("mean", (0, 1)), ("mean_per_pos", (0,))])
def test_attribution_patch__of_means__takes_any_reference(ablation, kept):
    given = {"ablation": ablation, "reference": [{"x": Y}, {"x": X}]}
    found = attribution_patch(squared, {"x": X}, None, itself, site="h", over=("pos", "d"), **given)
    mean = jnp.stack([2 * X, 2 * Y]).reshape(6, 4, 5).mean(kept)
    slope = 2 * (2 * X @ W)[..., None] * W
    assert_allclose(
        jnp.moveaxis(found.per_example, -1, 0), (2 * X - mean) * slope, **TOL["float32", "gradient"]
    )


def test_attribution_patch__of_axes_without_names__sums_over_them():
    fn = lambda x: (mj.site(x, "h", axes=("d",)) ** 2).sum((1, 2))
    found = attribution_patch(fn, X, Y, itself, site="h", over=("d",))
    assert_allclose(found.per_example, (2 * X * (X - Y)).sum(1).T, **TOL["float32", "gradient"])


def test_attribution__of_what_cannot_be__says_what_would(as_a_user):
    def refused(error, match, fn, **how):
        with pytest.raises(error, match=match):
            attribution_patch(fn, X, Y, itself, **{"site": "h", "over": ("d",), **how})

    shared = lambda x: (mj.site(x.sum(0), "h", axes=("pos", "d")) * x).sum((1, 2))
    refused(SiteError, r"without an axis of the 3 examples in front.*`activation_patch`", shared)
    refused(SiteError, r"`h` holds int32, which has no gradient", _whole)
    with pytest.raises(ShapeError, match=r"`h` has the mean \(1, 2, 5\), and the pairs have \(3, 4, 5\)"):
        attribution_patch(
            squared, X, None, itself, site="h", over=("d",), ablation="mean_per_pos", reference=X[:, :2]
        )
    with pytest.raises(ArgumentError, match=r"site `h` is not finite in a run without patches"):
        attribution_patch(squared, X.at[0, 0].set(jnp.inf), Y, itself, site="h", over=("d",))


def _whole(x):
    """A site of whole numbers."""
    return mj.site((x > 0).astype(jnp.int32), "h", axes=("d",)).astype(jnp.float32).sum((1, 2))


def test_means__of_a_site_without_names__refuses_to_guess_its_examples():
    fn = lambda x: mj.site(x, "h").sum()
    with pytest.raises(
        SiteError, match=r"means of `h`: its value has shape \(3, 4, 5\) and its axes have no names"
    ):
        mj.means(fn, X, "h")
    named = lambda x, y: mj.site(x + y, "h", axes=("pos", "d")).sum()
    found = mj.means(named, [(X, Y), (X, X)], "h", per="pos")["h"]
    assert_allclose(found, np.stack([X + Y, X + X]).mean((0, 1)), **TOL["float32", "law"])
