"""Exact scores against a loop of masked runs, and of patches, one at a time."""

from functools import partial

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.models.experts import Experts
from tests.compilations import assert_numbers_are_data
from tests.tolerances import TOL

SWEEP = TOL["float32", "sweep"]
EXPERTS = {"mlp": "gated", "experts": Experts(n_experts=4, top_k=2, d_expert=6, layers=(1,))}
POST = {"norms": "both", "out_bias": False, "norm": "rms", "residual": "parallel", "mlp": "none"}


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param(EXPERTS, marks=pytest.mark.slow), pytest.param(POST, marks=pytest.mark.slow)],
    ids=["grouped", "experts", "attention only, norms after"],
)
def test_exact__all_edges_of_two_layers__equal_a_loop_of_masked_runs(small, draw, pair, metric, changes):
    model = draw(small(**changes))
    graph = mj.graph.build(model)
    found = mj.attribution.exact(model, *pair, metric, graph=graph, chunk_size=7)
    ablated, clean = mj.graph.writes(model, pair[1]), metric(model(pair[0]))
    kept = np.ones(len(graph.edges), np.float32)
    expected = []
    for edge in range(len(graph.edges)):
        kept[edge] = 0
        logits = mj.graph.masked_forward(model, pair[0], jnp.asarray(kept), ablated, graph=graph)
        expected.append((clean - metric(logits)).mean())
        kept[edge] = 1
    np.testing.assert_allclose(found.scores, np.array(expected), **SWEEP)
    np.testing.assert_allclose(found.clean, clean, **SWEEP)
    assert np.abs(found.scores).max() > 0.05


def test_exact__nodes__equal_patches_of_their_sites(model, graph, pair, metric):
    found = mj.attribution.exact(model, *pair, metric, graph=graph, over="node", chunk_size=4)
    acts = mj.capture(model, ["resid_pre", "z", "mlp_out"])(pair[1])[1]
    edits = [mj.replace("resid_pre", acts["resid_pre"][0], layer=0)]
    for layer in range(2):
        edits += [mj.replace("z", acts["z"][layer], layer=layer, head=head) for head in range(4)]
        edits += [mj.replace("mlp_out", acts["mlp_out"][layer], layer=layer)]
    clean = metric(model(pair[0]))
    expected = [(clean - metric(mj.intervene(model, [edit])(pair[0]))).mean() for edit in edits]
    np.testing.assert_allclose(found.scores, np.array(expected), **SWEEP)
    assert found.top(1)[0][0] in graph.nodes


@pytest.mark.slow
def test_exact__keys_for_every_head__move_the_metric_less_than_the_shared_ones(model, graph, pair, metric):
    """A shared key is all of its heads' at once: its score is none of theirs, but edges of queries keep theirs."""
    apart = mj.graph.build(model, grouped=False)
    whole, parts = (mj.attribution.exact(model, *pair, metric, graph=g) for g in (graph, apart))
    queries = [e for e in graph.edges if e.endswith("<q>") or e.endswith("logits")]
    np.testing.assert_allclose(
        whole.scores[np.array([graph.number(e) for e in queries])],
        parts.scores[np.array([apart.number(e) for e in queries])],
        **SWEEP,
    )
    assert len(apart.edges) > len(graph.edges)


def test_exact__a_shared_key__is_that_of_all_its_heads_cut_at_once(model, graph, pair, metric):
    found = mj.attribution.exact(model, *pair, metric, graph=graph)
    apart, ablated = mj.graph.build(model, grouped=False), mj.graph.writes(model, pair[1])
    clean = metric(model(pair[0]))
    heads = {"a0.h3->a1.kv1<k>": ("h2<k>", "h3<k>"), "input->a1.kv0<v>": ("h0<v>", "h1<v>"),
             "m0->a1.kv1<v>": ("h2<v>", "h3<v>")}  # fmt: skip
    for edge, cut in heads.items():
        kept = np.ones(len(apart.edges), np.float32)
        kept[[apart.number(f"{edge.partition('->')[0]}->a1.{head}") for head in cut]] = 0
        logits = mj.graph.masked_forward(model, pair[0], jnp.asarray(kept), ablated, graph=apart)
        effect = (clean - metric(logits)).mean()
        np.testing.assert_allclose(found.scores[graph.number(edge)], effect, **SWEEP)
        assert abs(effect) > 1e-3, edge


def test_exact__other_ablations__are_what_stands_in(model, graph, pair, metric):
    """A mean over one prompt is that prompt, and zeros in the place of nodes are edits that say so."""
    one = np.tile(pair[1][:1], (3, 1))
    run = partial(mj.attribution.exact, model, pair[0], graph=graph)
    expected = run(one, metric).scores
    found = run(None, metric, ablation="mean_per_pos", reference=one).scores
    np.testing.assert_allclose(found, expected, **SWEEP)
    nodes = run(None, metric, over="node", ablation="zero", chunk_size=4).scores
    z, mlp, clean = (
        np.zeros((3, 5, 4, 4), np.float32),
        np.zeros((3, 5, 8), np.float32),
        metric(model(pair[0])),
    )
    zeroed = {"a0.h1": mj.replace("z", z, layer=0, head=1), "a1.h3": mj.replace("z", z, layer=1, head=3),
              "m0": mj.replace("mlp_out", mlp, layer=0)}  # fmt: skip
    for node, edit in zeroed.items():
        effect = (clean - metric(mj.intervene(model, [edit])(pair[0]))).mean()
        np.testing.assert_allclose(nodes[graph.nodes.index(node)], effect, **SWEEP)


@pytest.mark.parametrize("how", [{}, {"over": "node", "chunk_size": 4}], ids=["edges", "nodes"])
def test_exact__other_numbers__compile_nothing_and_equal_prompts_give_zero(
    model, graph, pair, metric, caplog, how
):
    run = partial(mj.attribution.exact, model, graph=graph, **how)
    assert_numbers_are_data(run, pair, metric, caplog)
    broken = eqx.tree_at(lambda m: m.blocks.mlp.W_out, model, model.blocks.mlp.W_out.at[0].set(jnp.nan))
    with pytest.raises(ArgumentError, match="`mlp_out` of layer 0 is not finite in this run"):
        mj.attribution.exact(broken, *pair, metric, graph=graph, **how)


def test_exact__bad_input__is_explained(model, graph, pair, metric, as_a_user):
    with pytest.raises(ArgumentError, match="over='neuron': expected 'edge' or 'node'"):
        mj.attribution.exact(model, *pair, metric, graph=graph, over="neuron")
    with pytest.raises(ArgumentError, match="chunk_size=0: at least one edge must run at once"):
        mj.attribution.exact(model, *pair, metric, graph=graph, chunk_size=0)
