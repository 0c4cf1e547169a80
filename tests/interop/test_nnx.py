"""NNX: against `nnx.capture`, a forward edited by hand, and `jax.grad`."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from numpy.testing import assert_allclose, assert_array_equal

import mechjax as mj
from mechjax.base.errors import ArgumentError, SiteError
from mechjax.interop import from_nnx
from tests.interop.networks import LAYERS, TOKENS, D, nnx_net
from tests.tolerances import TOL

LAYOUTS = ["loop", "scan"]


def _by_hand(model, change):
    """Logits, with `change(out, layer)` made to every MLP's output; written with the model's own parts."""
    x = model.embed(TOKENS)
    graph, state = nnx.split(model.blocks) if model.layout == "scan" else (None, None)
    for i in range(LAYERS):
        block = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], state)) if graph else model.blocks[i]
        x = x + change(block.mlp.down(nnx.gelu(block.mlp.up(block.norm(x)))), i)
    return model.unembed(model.norm(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_nnx__untransformed__is_the_model(layout):
    model = nnx_net(layout)
    subject = from_nnx(model)
    assert_array_equal(subject(TOKENS), model(TOKENS))
    assert "mechjax" not in str(jax.make_jaxpr(lambda s: s(TOKENS))(subject))
    assert type(model).__module__ == type(nnx_net(layout)).__module__ and "mechjax_path" not in vars(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_nnx__capture__equals_nnx_capture(layout):
    model = nnx_net(layout)
    out, acts = mj.capture(from_nnx(model), ["blocks.mlp.output", "blocks.input", "norm.output"])(TOKENS)
    assert_allclose(out, model(TOKENS), **TOL["float32", "layout"])
    assert acts["blocks.mlp.output"].shape == (LAYERS, *TOKENS.shape, D)
    assert_array_equal(acts["blocks.input"][0], model.embed(TOKENS))
    loop = nnx_net("loop")
    if (
        layout == "scan"
    ):  # its stacked numbers, laid out for the loop, where `nnx.capture` keeps every layer's
        state = nnx.state(model.blocks, nnx.Param)
        for i in range(LAYERS):
            nnx.update(loop.blocks[i], jax.tree.map(lambda a, i=i: a[i], state))
    _, kept = nnx.capture(loop, nnx.Intermediate, method_outputs=nnx.Intermediate)(TOKENS)
    for i in range(LAYERS):
        sown = kept["blocks"][i]["mlp"]["__call__"].get_value()[0]
        assert_allclose(acts["blocks.mlp.output"][i], sown, **TOL["float32", "layout"])


def test_from_nnx__sites__have_the_same_names_in_both_layouts():
    loop, scan = (mj.list_sites(from_nnx(nnx_net(layout)), TOKENS) for layout in LAYOUTS)
    assert {n: (i.layers, i.shape) for n, i in loop.items()} == {
        n: (i.layers, i.shape) for n, i in scan.items()
    }
    assert loop["blocks.mlp.up.output"].layers == LAYERS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_from_nnx__edits_and_gradients__equal_those_by_hand(layout):
    model = nnx_net(layout)
    subject = from_nnx(model, sites={"mlp_out": ("blocks.mlp.output", ("pos", "d_model"))})
    vector = jax.random.normal(jax.random.key(3), (D,))

    def steered(out, i):
        return out.at[:, -1].add(vector) if i == 1 else out

    edited = mj.intervene(subject, mj.add("mlp_out", vector, layer=1, pos=-1))
    assert_allclose(edited(TOKENS), _by_hand(model, steered), **TOL["float32", "layout"])
    _, grads = mj.value_and_grad_at(edited, lambda y: (y**2).sum(), "mlp_out")(TOKENS)

    def perturbed(delta):
        return (_by_hand(model, lambda out, i: steered(out, i) + delta[i]) ** 2).sum()

    expected = jax.grad(perturbed)(jnp.zeros((LAYERS, *TOKENS.shape, D)))
    assert_allclose(grads["mlp_out"], expected, **TOL["float32", "gradient"])


def test_from_nnx__gradient_of_parameters__goes_through_the_edit():
    subject = from_nnx(nnx_net("scan"))
    with_edit = lambda s: (mj.intervene(s, mj.zero("blocks.mlp.output", layer=0))(TOKENS) ** 2).sum()
    grads = jax.grad(with_edit, allow_int=True)(subject)
    kernel = grads.state["blocks"]["mlp"]["up"]["kernel"][...]
    assert not kernel[0].any() and kernel[1].any()


class _Noisy(nnx.Module):
    def __init__(self, rngs):
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(D, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dropout(x))


def test_from_nnx__calls_that_change_the_model__start_from_the_same_state():
    x = jax.random.normal(jax.random.key(1), (4, D))
    model = _Noisy(nnx.Rngs(0))
    subject = from_nnx(model)
    first, acts = mj.capture(subject, "dropout.output")(x)
    assert_array_equal(subject(x), subject(x))
    assert_allclose(first, subject(x), **TOL["float32", "layout"])
    assert (acts["dropout.output"] == 0).any()
    expected = model(x)  # its first call, from the state that the subject copied
    assert_allclose(first, expected, **TOL["float32", "layout"])


class _Heterogeneous(nnx.Module):
    def __init__(self, rngs):
        widths = (D, 5, 7, 3)
        self.layers = nnx.List([nnx.Sequential(nnx.Linear(a, b, rngs=rngs)) for a, b in pairwise(widths)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_from_nnx__numbered_modules_of_other_shapes__keep_their_numbers():
    sites = mj.list_sites(from_nnx(_Heterogeneous(nnx.Rngs(0))), jnp.ones((2, D)))
    assert sites["layers_2.output"].shape == (2, 3) and sites["layers_2.output"].layers is None


def test_from_nnx__something_else__is_refused(as_a_user):
    with pytest.raises(ArgumentError, match=r"takes a flax.nnx.Module, got function"):
        from_nnx(lambda x: x)
    with pytest.raises(SiteError, match=r"no site is named `block.output`.*Did you mean `blocks.output`"):
        mj.capture(from_nnx(nnx_net("scan")), "block.output")(TOKENS)
