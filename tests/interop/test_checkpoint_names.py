"""Marks of `checkpoint_name`, as MaxText lays them, against the values themselves."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.interop import from_checkpoint_names
from tests.tolerances import TOL

LAYERS, D = 3, 4
WEIGHTS = jax.random.normal(jax.random.key(0), (LAYERS, D, D))
X = jax.random.normal(jax.random.key(1), (2, D))
SAVE_ONLY = jax.checkpoint_policies.save_only_these_names("mlp_out")


def layer(x, w):
    hidden = checkpoint_name(jnp.tanh(x @ w), "mlp_out")
    return checkpoint_name(x + hidden, "decoder_layer_output")


def scanned(x, ws=WEIGHTS, wrap=lambda f: f):
    return jax.lax.scan(wrap(lambda x, w: (layer(x, w), None)), x, ws)[0] * 2


def unrolled(x, ws=WEIGHTS):
    run = jax.jit(layer)  # one trace for all layers
    for w in ws:
        x = run(x, w)
    return x * 2


def remat(x, ws=WEIGHTS):
    return scanned(x, ws, lambda f: jax.checkpoint(f, policy=SAVE_ONLY))


def by_hand(x, change=lambda out, i: out):
    outs = []
    for i in range(LAYERS):
        outs.append(change(jnp.tanh(x @ WEIGHTS[i]), i))
        x = x + outs[-1]
    return x * 2, jnp.stack(outs)


FUNCTIONS = [scanned, unrolled, remat]


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_checkpoint_names__capture_and_edit__equal_those_by_hand(fn):
    subject = from_checkpoint_names(fn)
    assert_array_equal(subject(X), fn(X))
    out, acts = mj.capture(subject, "mlp_out")(X)
    expected, outs = by_hand(X)
    assert_allclose(out, expected, **TOL["float32", "layout"])
    assert_allclose(acts["mlp_out"], outs, **TOL["float32", "layout"])
    edited = mj.intervene(subject, mj.scale("mlp_out", 3.0, layer=1))
    expected, _ = by_hand(X, lambda out, i: 3 * out if i == 1 else out)
    assert_allclose(edited(X), expected, **TOL["float32", "layout"])


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_checkpoint_names__gradients__equal_those_of_a_perturbed_forward(fn):
    subject = from_checkpoint_names(fn, sites={"act": ("mlp_out", ("unit",))})
    edit = mj.replace("act", 0.5, layer=0, unit=1)
    _, grads = mj.value_and_grad_at(mj.intervene(subject, edit), lambda y: (y**2).sum(), "act")(X)

    def change(out, i):
        return out.at[:, 1].set(0.5) if i == 0 else out

    expected = jax.grad(lambda d: (by_hand(X, lambda o, i: change(o, i) + d[i])[0] ** 2).sum())(
        jnp.zeros((LAYERS, 2, D))
    )
    assert_allclose(grads["act"], expected, **TOL["float32", "gradient"])
    # Through the edit, to the input; and to the weights, which are arguments.
    through = jax.grad(lambda x: (mj.intervene(subject, edit)(x) ** 2).sum())(X)
    assert_allclose(
        through, jax.grad(lambda x: (by_hand(x, change)[0] ** 2).sum())(X), **TOL["float32", "gradient"]
    )


def test_checkpoint_names__names_of_several_kinds__are_numbered():
    def fn(x):
        x = checkpoint_name(x + 1, "a")
        x = checkpoint_name(jnp.concatenate([x, x]), "a")
        x, _ = jax.lax.scan(lambda x, _: (checkpoint_name(x * 2, "b"), None), x, length=2)
        return checkpoint_name(x, "b")

    sites = mj.list_sites(from_checkpoint_names(fn), X)
    assert {n: i.layers for n, i in sites.items()} == {
        "a.call_0": None,
        "a.call_1": None,
        "b.call_0": 2,
        "b.call_1": None,
    }


def test_checkpoint_names__saved_names__are_still_saved():
    kept = jax.make_jaxpr(
        jax.grad(lambda x: mj.intervene(from_checkpoint_names(remat), mj.zero("mlp_out", layer=0))(x).sum())
    )(X)
    assert "name=mlp_out" in str(kept) and "SaveOnlyTheseNames" in str(kept)


def test_checkpoint_names__nothing_to_find__is_said(as_a_user):
    with pytest.raises(SiteError, match=r"marks nothing with jax.ad_checkpoint.checkpoint_name"):
        mj.capture(from_checkpoint_names(jnp.sin), "mlp_out")(X)
    with pytest.raises(SiteError, match=r"`mlp_out` is marked .* differentiated already"):
        mj.capture(from_checkpoint_names(jax.grad(lambda x: scanned(x).sum())), "mlp_out")(X)
    with pytest.raises(SiteError, match="Did you mean `mlp_out`"):
        mj.capture(from_checkpoint_names(scanned), "mlp_outs")(X)
    with pytest.raises(ArgumentError, match="takes a function, got int"):
        from_checkpoint_names(3)


def test_import__interop__loads_no_flax():
    code = "import sys, mechjax.interop; print('flax' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "False"
