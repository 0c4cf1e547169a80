"""Each backward rule against its closed form, in double precision, and that none changes a number of the forward."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from mechjax.base.errors import ArgumentError, UnsupportedModelError
from mechjax.models import Config, init
from mechjax.models.backward_rules import ATTNLRP, GIM, GRADIENT, RELP, Rules, backward_rules
from mechjax.models.experts import Experts
from tests.tolerances import TOL

CONFIG = Config(
    d_vocab=11, n_ctx=6, d_model=6, n_layers=2, n_heads=2, d_head=3, d_mlp=5, mlp="gated", activation="silu"
)
DOUBLE = TOL["float64", "gradient"]
PLAIN = lambda x, _: x


@pytest.fixture(scope="module")
def model():
    leaves, tree = jax.tree.flatten(init(CONFIG, key=jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def double(model):
    return jax.tree.map(lambda x: x.astype(np.float64), model)


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def pulled(fn, x, g):
    return np.asarray(jax.vjp(fn, jnp.asarray(x))[1](jnp.asarray(g))[0])


def first(part):
    return jax.tree.map(lambda x: x[0], part)


@pytest.mark.parametrize("rules", [RELP, ATTNLRP, GIM, Rules(attn="frozen")], ids=repr)
def test_backward_rules__forward__is_the_same_to_the_bit(model, rules):
    ids, ruled = jnp.array([[1, 2, 3, 4]]), backward_rules(model, rules)
    np.testing.assert_array_equal(ruled(ids), model(ids))
    assert len(jax.tree.leaves(ruled)) == len(jax.tree.leaves(model))


def test_norm_rule__is_the_slope_at_a_constant_scale(model):
    with jax.enable_x64(True):
        norm = double(backward_rules(model, RELP)).ln_final
        x, g = drawn(4, 6), drawn(4, 6, seed=1)
        a = g * np.asarray(norm.w) / np.sqrt(x.var(-1, keepdims=True) + CONFIG.norm_eps)
        np.testing.assert_allclose(
            pulled(lambda x: norm(x, CONFIG), x, g), a - a.mean(-1, keepdims=True), **DOUBLE
        )


@pytest.mark.parametrize(
    ("rules", "gated"), [(RELP, True), (GIM, True), (RELP, False), (Rules(act="identity"), True)]
)
def test_mlp_rules__are_half_of_each_factor_and_the_ratio_of_the_activation(model, rules, gated):
    with jax.enable_x64(True):
        if not gated:
            model = eqx.tree_at(lambda m: (m.blocks.mlp.W_gate, m.blocks.mlp.b_gate), model, (None, None))
        mlp = first(double(backward_rules(model, rules)).blocks.mlp)
        x, g = drawn(4, 6), drawn(4, 6, seed=1)
        W = {name: np.asarray(getattr(mlp, name)) for name in ("W_in", "W_out", "b_in")}
        linear = x @ W["W_in"] + W["b_in"]
        pre = x @ np.asarray(mlp.W_gate) + np.asarray(mlp.b_gate) if gated else linear
        sigmoid = 1 / (1 + np.exp(-pre))
        slope = sigmoid if rules.act == "identity" else sigmoid * (1 + pre * (1 - sigmoid))
        back = g @ W["W_out"].T
        if gated:
            share = 0.5 if rules.mul == "half" else 1.0
            expected = share * (back * linear * slope) @ np.asarray(mlp.W_gate).T
            expected = expected + share * (back * pre * sigmoid) @ W["W_in"].T
        else:
            expected = (back * slope) @ W["W_in"].T
        np.testing.assert_allclose(pulled(lambda x: mlp(x, CONFIG, PLAIN), x, g), expected, **DOUBLE)


@pytest.mark.parametrize("rules", [GIM, ATTNLRP, Rules(attn="frozen")], ids=repr)
def test_attention_rules__are_shares_of_each_product_and_a_softmax_at_another_temperature(model, rules):
    with jax.enable_x64(True):
        ruled = double(backward_rules(model, rules))
        attn, n_pos = first(ruled.blocks.attn), 4
        x, g = drawn(n_pos, 6), drawn(n_pos, 6, seed=1)
        W = {
            name: np.asarray(getattr(attn, name))
            for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V")
        }
        q, k, v = (np.einsum("pm,mhd->phd", x, W[f"W_{c}"]) + W[f"b_{c}"] for c in "QKV")
        scores = np.einsum("qhd,khd->hqk", q, k) * CONFIG.attn_scale
        scores[:, ~np.tri(n_pos, dtype=bool)] = -np.inf
        soft = lambda s: special.softmax(s, -1)
        dz = np.einsum("pm,hdm->phd", g, W["W_O"])
        dp, s = np.einsum("qhd,khd->hqk", dz, v), soft(scores / rules.softmax)
        ds = s * (dp - (dp * s).sum(-1, keepdims=True)) * CONFIG.attn_scale
        of_product, of_values = {"half": (0.25, 0.5), "frozen": (0.0, 1.0)}[rules.attn]
        parts = {
            "Q": of_product * np.einsum("hqk,khd->qhd", ds, k),
            "K": of_product * np.einsum("hqk,qhd->khd", ds, q),
            "V": of_values * np.einsum("hqk,qhd->khd", soft(scores), dz),
        }
        expected = sum(np.einsum("phd,mhd->pm", part, W[f"W_{c}"]) for c, part in parts.items())
        _, here = ruled.of_kind(0, None)
        sequence = ruled.arrange(n_pos)
        run = lambda x: attn(x, x, None, sequence, here, CONFIG, PLAIN)[0]
        np.testing.assert_allclose(pulled(run, x, g), expected, **DOUBLE)


def test_act_rule__where_the_activation_is_zero__is_its_slope_there(model):
    mlp = first(backward_rules(model, Rules(act="identity")).blocks.mlp)
    mlp = jax.tree.map(lambda x: x * 0 if x.ndim == 1 else x, mlp)
    slope = jax.grad(lambda x: mlp(x, CONFIG, PLAIN).sum())(jnp.zeros((1, 6)))
    assert np.isfinite(slope).all()


def test_backward_rules__bad_input__is_explained(model):
    with pytest.raises(ArgumentError, match="Rules\\(mul='third'\\): the row has 'gradient', 'half'"):
        Rules(mul="third")
    with pytest.raises(ArgumentError, match="Rules\\(softmax=0\\): a temperature above zero"):
        Rules(softmax=0)
    experts = dataclasses.replace(CONFIG, experts=Experts(n_experts=4, top_k=2, d_expert=6))
    with pytest.raises(
        UnsupportedModelError, match="experts, whose gate has no rule here, and RELP would be"
    ):
        backward_rules(init(experts, key=jax.random.key(0)), RELP)
    assert backward_rules(model, GRADIENT) is model
    assert repr(Rules(softmax=3.0)) == "Rules(softmax=3.0)"
