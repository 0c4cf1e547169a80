"""On an affine model every gradient method is exact: methods of activations and backward rules against cut edges.

`eap`, `eap_ig`, `attribution_patch` and `integrated_gradients` are held against exact scores beside their own tests.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import ATTNLRP, GIM, RELP

TIGHT = {"rtol": 1e-8, "atol": 1e-8}


@pytest.fixture(scope="module", autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def straight(small, draw, affine):
    return affine(draw(small(activation="relu", norm_eps=1e18), np.float64))


@pytest.fixture(scope="module")
def cut(straight, graph, pair, metric):
    return np.asarray(mj.attribution.exact(straight, *pair, metric, graph=graph).scores)


def test_direct_logit_attribution__of_an_affine_model__is_what_cutting_edges_to_the_logits_does(
    straight, graph, cut, pair, metric
):
    direct = mj.attribution.direct_logit_attribution(straight, *pair, metric).scores
    to_logits = [cut[graph.number(f"a{i}.h{h}->logits")] for i in range(2) for h in range(4)]
    np.testing.assert_allclose(direct.ravel(), to_logits, **TIGHT)
    assert not np.any(mj.attribution.direct_logit_attribution(straight, pair[0], pair[0], metric).scores)
    assert np.abs(to_logits).max() > 0.05


@pytest.mark.slow
def test_atp_star__of_an_affine_model__is_what_cutting_the_edges_of_its_nodes_does(
    straight, graph, cut, pair, metric
):
    out = np.bincount(graph.table[:, 0], cut)[1:].reshape(2, 5)  # effects add up
    heads, mlps = out[:, :4], out[:, 4]
    star = mj.attribution.atp_star(
        straight, *pair, metric, per_position=False, grad_drop=False, reduce="mean"
    ).scores
    np.testing.assert_allclose(star["z"], heads, **TIGHT)
    np.testing.assert_allclose(star["mlp_out"], mlps, **TIGHT)
    np.testing.assert_allclose(star["v"], heads.reshape(2, 2, 2).sum(-1), **TIGHT)
    assert not np.any(star["q"]) and not np.any(star["k"])  # attention looks everywhere alike
    assert np.abs(heads).max() > 0.05


def test_rules__that_do_not_halve_attention__are_exact_too(straight, graph, cut, pair, metric):
    found = mj.attribution.eap(straight, *pair, metric, graph=graph, rules=RELP)
    np.testing.assert_allclose(found.scores, cut, **TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("rules", [ATTNLRP, GIM], ids=repr)
def test_rules__that_halve_attention__are_exact_but_for_what_passes_it(
    straight, graph, cut, pair, metric, rules
):
    """A product of pattern and values is shared by both, though here the pattern stands still."""
    found = mj.attribution.eap(straight, *pair, metric, graph=graph, rules=rules).scores
    values = np.array([edge.endswith("<v>") and "->a1" in edge for edge in graph.edges])
    np.testing.assert_allclose(found[values], cut[values] / 2, **TIGHT)
    silent = eqx.tree_at(lambda m: m.blocks.attn.W_O, straight, replace_fn=jnp.zeros_like)
    exact, found = (
        method(silent, *pair, metric, graph=graph, **how).scores
        for method, how in ((mj.attribution.exact, {}), (mj.attribution.eap, {"rules": rules}))
    )
    np.testing.assert_allclose(found, exact, **TIGHT)
    assert np.abs(cut[values]).max() > 0.05 and np.abs(exact).max() > 0.05


@pytest.mark.slow
def test_exact__of_an_affine_model__adds_up_over_edges(straight, graph, cut, pair, metric):
    """So that sums above are what a node does."""
    nodes = mj.attribution.exact(straight, *pair, metric, graph=graph, over="node").scores
    np.testing.assert_allclose(nodes, np.bincount(graph.table[:, 0], cut), **TIGHT)
