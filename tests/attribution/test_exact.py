"""Exact scores against a loop of masked runs, and of patches, one at a time."""

import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.models.experts import Experts
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


def test_exact__clean_equals_corrupt__is_zero(model, graph, pair, metric):
    found = mj.attribution.exact(model, pair[0], pair[0], metric, graph=graph)
    np.testing.assert_allclose(found.scores, np.zeros(len(graph.edges)), **TOL["float32", "law"])


def test_exact__bad_input__is_explained(model, graph, pair, metric, as_a_user):
    with pytest.raises(ArgumentError, match="over='neuron': expected 'edge' or 'node'"):
        mj.attribution.exact(model, *pair, metric, graph=graph, over="neuron")
    with pytest.raises(ArgumentError, match="chunk_size=0: at least one edge must run at once"):
        mj.attribution.exact(model, *pair, metric, graph=graph, chunk_size=0)
