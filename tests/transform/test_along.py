"""Sites inside a loop along one of their axes: edits flow on through the loop, captures see the whole axis."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import SiteError
from mechjax.transform.site import site
from tests.tolerances import TOL

LAYERS, BATCH, POS, D = 2, 3, 5, 4
X = jax.random.normal(jax.random.key(0), (BATCH, POS, D))
AXES = ("pos", "d")


def recur(x, wrap=lambda h, layer, t: h, np=np):
    """`h = 0.5 h + x` along positions, then the next layer reads `tanh(h)`; every state may be changed.

    Returns (output, states of shape (layer, *batch, pos, d)).
    """
    x, every = np.asarray(x), []
    for layer in range(LAYERS):
        h, states = 0 * x[..., 0, :], []
        for t in range(POS):
            h = wrap(0.5 * h + x[..., t, :], layer, t)
            states.append(h)
        every.append(np.stack(states, -2))
        x = np.tanh(every[-1])
    return x, np.stack(every)


def f(x, layers=LAYERS):
    """The same as scans, with a site."""

    def block(x, layer):
        def step(h, xs):
            t, now = xs
            h = (0.5 * h + now)[..., None, :]
            h = site(h, "h", layer=layer, layers=layers, axes=AXES, along=("pos", t, POS))[..., 0, :]
            return h, jnp.tanh(h)

        xs = (jnp.arange(POS, dtype=jnp.int32), jnp.moveaxis(x, -2, 0))
        return jnp.moveaxis(lax.scan(step, jnp.zeros_like(x[..., 0, :]), xs)[1], 0, -2), None

    return lax.scan(block, x, jnp.arange(layers, dtype=jnp.int32))[0]


def test_list_sites__of_a_loop_along_an_axis__show_it_whole():
    info = mj.list_sites(f, X)["h"]
    assert (info.axes, info.shape, info.layers) == (AXES, (BATCH, POS, D), LAYERS)


def test_capture__along_a_loop__is_every_state_or_the_part_that_is_asked_for():
    out, acts = mj.capture(f, ["h"])(X)
    right, states = recur(X)
    assert_allclose(out, right, **TOL["float32", "law"])
    assert_allclose(acts["h"], states, **TOL["float32", "law"])
    assert acts.ran["h"].all()
    for index, part in PARTS:
        found = mj.capture(f, ["h"], layers=[1], **index)(X)[1]["h"]
        assert_allclose(found, part(states)[1:], **TOL["float32", "law"])


PARTS = [
    ({"pos": -2}, lambda s: s[:, :, -2]),
    ({"pos": [4, 0, 4], "d": [2, 3, 1]}, lambda s: s[:, :, [4, 0, 4]][..., [2, 3, 1]]),
    ({"d": 0}, lambda s: s[..., 0]),
    (
        {"pos": mj.per_example(np.array([1, 4, 0]))},
        lambda s: np.stack([s[:, b, [t]] for b, t in enumerate((1, 4, 0))], 1),
    ),
]
VALUE = np.linspace(-1.0, 1.0, D, dtype=np.float32)


def but(h, index, value):
    """A copy with one number of each example changed."""
    h = np.array(h)
    h[..., index] = value
    return h


EDITS = {
    "replace": (mj.replace("h", VALUE, layer=0, pos=1), lambda h, i, t: VALUE + 0 * h if (i, t) == (0, 1) else h),
    "add at several": (mj.add("h", VALUE, pos=[1, 3]), lambda h, i, t: h + VALUE if t in (1, 3) else h),
    "scale everywhere": (mj.scale("h", 0.9, layer=1), lambda h, i, t: 0.9 * h if i == 1 else h),
    "zero of a part": (mj.zero("h", pos=-1, d=2), lambda h, i, t: but(h, 2, 0) if t == POS - 1 else h),
    "values by position": (
        mj.replace("h", X[0], layer=0), lambda h, i, t: np.asarray(X[0, t]) + 0 * h if i == 0 else h
    ),
    "per example": (
        mj.add("h", 1.0, layer=0, pos=mj.per_example(np.array([0, 2, 4]))),
        lambda h, i, t: h + np.float32(np.array([[0], [2], [4]]) == t) if i == 0 else h,
    ),
    "clamp": (mj.clamp("h", high=0.1), lambda h, i, t: np.minimum(h, np.float32(0.1))),
    "project out": (
        mj.project_out("h", jnp.eye(D)[0], layer=1, pos=2), lambda h, i, t: but(h, 0, 0) if (i, t) == (1, 2) else h
    ),
    "apply": (mj.apply("h", lambda x, info: x**2, layer=0, pos=[0, 2]), lambda h, i, t: h**2 if i == 0 and t in (0, 2) else h),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_edits__along_a_loop__flow_on_as_in_the_loop_written_out(name):
    edit, wrap = EDITS[name]
    out, acts = mj.capture(mj.intervene(f, [edit]), ["h"])(X)
    right, states = recur(X, wrap)
    assert_allclose(out, right, **TOL["float32", "law"])
    assert_allclose(acts["h"], states, **TOL["float32", "law"])
    assert np.abs(right - recur(X)[0]).max() > 1e-3


@pytest.mark.slow
def test_edits__under_vmap_of_examples_edits_and_layers__equal_loops():
    g = mj.capture(mj.intervene(f, [mj.add("h", 1.0, layer=0, pos=2)]), ["h"])
    out, acts = eqx.filter_vmap(g)(X)
    right, kept = g(X)
    assert_allclose(out, right, **TOL["float32", "law"])
    assert_allclose(acts["h"], np.moveaxis(kept["h"], 1, 0), **TOL["float32", "law"])
    at = lambda layer, pos: mj.intervene(f, [mj.scale("h", 0.0, layer=layer, pos=pos)])(X)
    many = jax.vmap(at)(jnp.array([0, 1, 1]), jnp.array([1, 0, 4]))
    for found, (layer, pos) in zip(many, ((0, 1), (1, 0), (1, 4)), strict=True):
        wrap = lambda h, i, t, layer=layer, pos=pos: 0 * h if (i, t) == (layer, pos) else h
        assert_allclose(found, recur(X, wrap)[0], **TOL["float32", "law"])


def test_gradients__at_states__equal_differences_of_the_loop_written_out():
    value, grads = mj.value_and_grad_at(f, lambda y: (y**2).sum(), ["h"])(X)

    @jax.jit
    def right(z, s):
        loop = lambda h, i, t: (s * h if t == 1 else h) + z[i, t]
        return (recur(X, loop, jnp)[0] ** 2).sum()

    zeros = jnp.zeros((LAYERS, POS, BATCH, D))
    assert_allclose(value, right(zeros, 1.0), **TOL["float32", "law"])
    assert_allclose(grads["h"], np.moveaxis(jax.grad(right)(zeros, 1.0), 1, 2), **TOL["float32", "gradient"])
    through = jax.grad(lambda s: (mj.intervene(f, [mj.scale("h", s, pos=1)])(X) ** 2).sum())(0.7)
    assert_allclose(through, jax.grad(right, 1)(zeros, 0.7), **TOL["float32", "gradient"])


def test_edit__at_a_traced_index_out_of_range__is_a_miss():
    run = jax.jit(lambda pos: mj.intervene(f, [mj.zero("h", pos=pos)])(X))
    assert np.isnan(run(POS)).all() and np.isfinite(run(POS - 1)).all()
    with pytest.raises(SiteError, match=r"pos 5 is out of range"):
        mj.intervene(f, [mj.zero("h", pos=POS)])(X)


def test_loop__that_runs_twice__reads_nan():
    twice = lambda x: f(x, layers=1) + f(x, layers=1)
    assert np.isnan(mj.capture(twice, ["h"])(X)[1]["h"]).all()
    assert_array_equal(
        mj.capture(lambda x: f(x, layers=1), ["h"])(X)[1]["h"][0], mj.capture(f, ["h"])(X)[1]["h"][0]
    )


def test_reduce__along_a_loop__is_refused():
    with pytest.raises(
        SiteError, match=r"formed along `pos`, one index at a time, so reduce= would never see it whole"
    ):
        mj.capture(f, ["h"], reduce=lambda x, info: x.sum())(X)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"axes": ("d",), "layer": 0, "layers": 1}, r"must have that axis among \('d',\), of length 1"),
        ({"axes": AXES, "layer": 0, "layers": 1}, r"its value, of shape \(3, 5, 4\), must have that axis"),
        ({"axes": ("pos", "pos2", "d")}, r"must have that axis"),
    ],
)
def test_site__along_what_it_does_not_have__is_refused(given, message):
    with pytest.raises(SiteError, match=message):
        site(X, "h", along=("pos", 0, POS), **given)
    with pytest.raises(SiteError, match=r"the loop's counter is no layer"):
        site(X[:, :1], "h", axes=AXES, along=("pos", 0, POS))


def test_site__vmapped_over_its_index__is_refused():
    g = lambda x, t: site(x, "h", layer=0, layers=1, axes=AXES, along=("pos", t, POS))
    with pytest.raises(SiteError, match=r"vmapped over its index along `pos`"):
        jax.vmap(g)(X[:, None, :1], jnp.arange(3))
