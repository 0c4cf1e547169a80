"""Axes that a model maps over, as ordinary axes of its sites."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import SiteError
from mechjax.interop import from_equinox
from mechjax.interop.unmapped import unmapped
from tests.tolerances import TOL

X = jax.random.normal(jax.random.key(0), (2, 3, 4))  # (example, pos, d)


class Inner(eqx.Module):
    def __call__(self, x):  # (d,)
        return jnp.sin(x)


class Outer(eqx.Module):
    """Of one example; its inner module is of one position."""

    inner: Inner

    def __call__(self, x):
        return jnp.cumsum(jax.vmap(self.inner)(x), 0)


SUBJECT = from_equinox(Outer(Inner()), sites={"act": ("inner.output", ("pos", "d"))})


def test_site__under_a_map_of_the_model__is_addressed_by_the_mapped_axis():
    one = X[0]
    assert mj.list_sites(SUBJECT, one)["act"].local == (3, 4)
    found = mj.intervene(SUBJECT, mj.zero("act", pos=1, d=2))(one)
    assert_allclose(found, jnp.cumsum(jnp.sin(one).at[1, 2].set(0), 0), **TOL["float32", "law"])


def test_batched__of_a_subject__takes_edits_that_differ_between_examples():
    many = SUBJECT.batched()
    assert_array_equal(many(X), jax.vmap(SUBJECT)(X))
    put = jnp.arange(24.0).reshape(X.shape)
    found = mj.intervene(many, mj.replace("act", put, pos=mj.per_example(jnp.array([0, 2]))))(X)
    changed = jnp.sin(X).at[jnp.arange(2), jnp.array([0, 2])].set(put[jnp.arange(2), jnp.array([0, 2])])
    assert_allclose(found, jnp.cumsum(changed, 1), **TOL["float32", "law"])
    assert str(jax.make_jaxpr(many)(X)) == str(
        jax.make_jaxpr(jax.vmap(SUBJECT))(X)
    )  # nothing moves untransformed


def test_unmapped__of_maps_over_other_axes__has_them_in_front():
    fn = lambda x: mj.site(x * 2, "h", axes=("d",)).sum(-1)
    both = jax.vmap(
        jax.vmap(fn, in_axes=1), in_axes=2
    )  # the outer over the last axis, the inner over the second
    info = mj.list_sites(unmapped(both), X)["h"]
    assert (info.local, mj.list_sites(both, X)["h"].local) == ((4, 3, 2), (2,))
    out, acts = mj.capture(unmapped(both), "h")(X)
    assert_array_equal(acts["h"], 2 * X.T)
    assert_array_equal(out, both(X))


def test_sites__with_more_names_than_axes__are_refused():
    subject = from_equinox(Outer(Inner()), sites={"act": ("inner.output", ("batch", "head", "pos", "d"))})
    with pytest.raises(SiteError, match=r"`act` is given the axes .*, and holds an array of shape \(3, 4\)"):
        mj.list_sites(subject, X[0])
