"""Equinox: against a forward written out by hand, and `jax.grad` of it."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxpr_as_fun
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.interop import from_equinox
from tests.interop.networks import LAYERS, TOKENS, D, EqxBlock, equinox
from tests.tolerances import TOL

LAYOUTS = ["loop", "scan"]


def _by_hand(model, tokens, change=lambda out, i: out):
    """Logits of one example and every MLP's output, `change(out, layer)` made to it."""
    x, outs = jax.vmap(model.embed)(tokens), []
    for i in range(LAYERS):
        block = jax.tree.map(lambda a, i=i: a[i], model.blocks) if model.layout == "scan" else model.blocks[i]
        up, down = block.mlp.layers
        hidden = jax.nn.gelu(jax.vmap(up)(jax.vmap(block.norm)(x)))
        outs.append(change(jax.vmap(down)(hidden), i))
        x = x + outs[-1]
    return jax.vmap(model.unembed)(x), jnp.stack(outs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_equinox__untransformed__is_the_model(layout):
    model = equinox(layout)
    subject = from_equinox(model)
    assert_array_equal(subject(TOKENS[0]), model(TOKENS[0]))
    wrapped, own = (jax.make_jaxpr(lambda f: f(TOKENS[0]))(f) for f in (subject, model))
    assert str(wrapped) == str(own)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_equinox__capture_under_vmap__equals_a_forward_by_hand(layout):
    model = equinox(layout)
    logits, acts = mj.capture(
        jax.vmap(from_equinox(model)), ["blocks.mlp.output", "blocks.mlp.layers_0.input"]
    )(TOKENS)
    expected, outs = jax.vmap(lambda t: _by_hand(model, t))(TOKENS)
    assert_allclose(logits, expected, **TOL["float32", "layout"])
    # The MLP runs under a vmap over positions inside the model: mapped axes lead.
    assert acts["blocks.mlp.output"].shape == (LAYERS, *TOKENS.shape, D)
    assert_allclose(acts["blocks.mlp.output"], outs.swapaxes(0, 1), **TOL["float32", "layout"])


def test_from_equinox__sites__have_the_same_names_in_both_layouts():
    loop, scan = (mj.list_sites(from_equinox(equinox(layout)), TOKENS[0]) for layout in LAYOUTS)
    assert {n: (i.layers, i.shape) for n, i in loop.items()} == {
        n: (i.layers, i.shape) for n, i in scan.items()
    }
    assert loop["blocks.mlp.layers_1.output"].layers == LAYERS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_equinox__edits_and_gradients__equal_those_by_hand(layout):
    model, tokens = equinox(layout), TOKENS[0]
    value = jax.random.normal(jax.random.key(3), (D,))

    def patched(out, i):
        return jnp.broadcast_to(value, out.shape) if i == 1 else out

    edited = mj.intervene(from_equinox(model), mj.replace("blocks.mlp.output", value, layer=1))
    assert_allclose(edited(tokens), _by_hand(model, tokens, patched)[0], **TOL["float32", "layout"])

    def perturbed(delta):
        return (_by_hand(model, tokens, lambda out, i: out + delta[i])[0] ** 2).sum()

    metric = lambda y: (y**2).sum()
    _, grads = mj.value_and_grad_at(from_equinox(model), metric, "blocks.mlp.output")(tokens)
    expected = jax.grad(perturbed)(jnp.zeros((LAYERS, tokens.size, D)))
    assert_allclose(grads["blocks.mlp.output"], expected, **TOL["float32", "gradient"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_equinox__positions_inside_a_module__are_addressed_by_name(layout):
    model, tokens = equinox(layout), TOKENS[0]
    subject = from_equinox(model, sites={"resid_post": ("blocks.output", ("pos", "d_model"))})
    zeroed = mj.intervene(subject, mj.zero("resid_post", layer=LAYERS - 1, pos=[0, 2]))
    blank = jax.vmap(model.unembed)(jnp.zeros((2, D)))
    assert_allclose(zeroed(tokens)[jnp.array([0, 2])], blank, **TOL["float32", "layout"])
    assert_allclose(zeroed(tokens)[1], model(tokens)[1], **TOL["float32", "layout"])


def test_from_equinox__jit_and_grad_of_parameters__go_through():
    subject = from_equinox(equinox("scan"))
    loss = lambda s: (mj.intervene(s, mj.zero("blocks.mlp.output", layer=0))(TOKENS[0]) ** 2).sum()
    grads = eqx.filter_jit(eqx.filter_grad(loss))(subject)
    weight = grads.model.blocks.mlp.layers[0].weight
    assert not weight[0].any() and weight[1].any()


class _Abstract(eqx.Module):
    size: eqx.AbstractVar[int]

    def __call__(self, x):
        return x * self.size


class _Concrete(_Abstract, strict=True):
    size: int = eqx.field(static=True, converter=int)

    def __check_init__(self):
        if self.size < 1:
            raise ValueError("never called again")

    def __call__(self, x):
        return super().__call__(x)


class _Jitted(eqx.Module):
    """Jits a function of its blocks, as users do; the trace of one block must not stand for another."""

    blocks: list[EqxBlock]
    scale: _Concrete

    def __call__(self, x):
        @jax.jit
        def run(block, x):
            return block(x)

        for block in self.blocks:
            x = run(block, x)
        return self.scale(x) if isinstance(self.scale, _Concrete) else x


def test_from_equinox__jit_inside_the_model__keeps_layers_apart():
    blocks = equinox("loop").blocks
    x = jax.random.normal(jax.random.key(2), (3, D))
    out, acts = mj.capture(from_equinox(_Jitted(blocks, _Concrete(2))), ["blocks.output", "scale.input"])(x)
    assert_allclose(acts["blocks.output"][0], blocks[0](x), **TOL["float32", "layout"])
    assert_allclose(acts["blocks.output"][1], blocks[1](blocks[0](x)), **TOL["float32", "layout"])
    assert_array_equal(acts["scale.input"], acts["blocks.output"][2])
    assert_array_equal(out, 2 * acts["scale.input"])


class _Replayed(eqx.Module):
    inner: eqx.nn.Linear

    def __call__(self, x):
        once = jax.make_jaxpr(self.inner)(x)
        return jaxpr_as_fun(once)(*jaxpr_as_fun(once)(x))[0]


def test_from_equinox__trace_that_is_run_twice__is_refused():
    subject = from_equinox(_Replayed(eqx.nn.Linear(D, D, key=jax.random.key(0))))
    with pytest.raises(SiteError, match="traced once and run several times"):
        mj.capture(subject, "inner.output")(jnp.ones(D))


def test_from_equinox__fixed_keywords__reach_every_call():
    key = jax.random.key(5)
    dropped = from_equinox(equinox("loop"), key=key)
    out, acts = mj.capture(dropped, "dropout.output")(TOKENS[0])
    assert (acts["dropout.output"] == 0).any()
    assert_allclose(out, equinox("loop")(TOKENS[0], key=key), **TOL["float32", "layout"])


def test_from_equinox__something_else__is_refused(as_a_user):
    with pytest.raises(ArgumentError, match=r"got function, which is no equinox.Module"):
        from_equinox(lambda x: x)
    with pytest.raises(SiteError, match=r"Did you mean `unembed.output`"):
        mj.capture(from_equinox(equinox("loop")), "unembedd.output")(TOKENS[0])
