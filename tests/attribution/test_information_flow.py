"""Information flow against its formula, written out, and routes against a walk over names."""

import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution import InformationFlow, Scores
from mechjax.base.errors import ArgumentError
from tests.tolerances import TOL


@pytest.fixture(scope="module")
def flow(model, graph, pair):
    return mj.attribution.information_flow(model, pair[0], graph=graph, chunk_size=4)


def into(flow, reader):
    edges = [i for i, e in enumerate(flow.graph.edges) if e.endswith(f"->{reader}")]
    return np.asarray(flow.importance)[edges]


def test_information_flow__into_readers_of_every_kind__is_the_formula(model, graph, pair, flow):
    acts = mj.capture(model, ["resid_pre", "result", "mlp_in", "mlp_out", "resid_post"])(pair[0])[1]
    writes = [acts["resid_pre"][0]]
    for layer in range(2):
        writes += [acts["result"][layer][..., head, :] for head in range(4)] + [acts["mlp_out"][layer]]
    reads = {"a1.h2<q>": (acts["resid_pre"][1], 6), "a1.kv0<v>": (acts["resid_pre"][1], 6),
             "m1": (acts["mlp_in"][1], 10), "logits": (acts["resid_post"][1], 11)}  # fmt: skip
    for reader, (x, n) in reads.items():
        near = np.abs(x).sum(-1) - np.abs(np.asarray(x) - np.stack(writes[:n])).sum(-1)
        near = np.maximum(near, 0)
        np.testing.assert_allclose(
            into(flow, reader), (near / near.sum(0)).mean((1, 2)), **TOL["float32", "sweep"]
        )
    sums = [into(flow, reader).sum() for reader in graph.readers]
    np.testing.assert_allclose(sums, 1, **TOL["float32", "sweep"])


def test_information_flow__of_padded_prompts__is_the_mean_of_each_alone(model, graph, pair):
    mask = np.arange(5) < np.array([5, 3, 3])[:, None]
    run = lambda prompts: mj.attribution.information_flow(model, prompts, graph=graph).importance
    found = run(mj.Prompts(jnp.asarray(pair[0]), jnp.asarray(mask)))
    expected = (run(pair[0][0]) + 2 * run(pair[0][1:, :3])) / 3
    np.testing.assert_allclose(found, expected, **TOL["float32", "sweep"])


def test_routes__of_a_flow__are_a_walk_down_from_the_logits(model, graph, flow):
    apart = InformationFlow(flow.importance, graph)
    strong = {e for e, x in zip(graph.edges, np.asarray(flow.importance), strict=True) if x >= 0.15}
    reached, todo = set(), ["logits"]
    while todo:
        reader = todo.pop()
        for edge in {e for e in strong if e.endswith(f"->{reader}")} - reached:
            reached.add(edge)
            node = edge.partition("->")[0]
            if node[0] == "a":
                shared = f"{node[:2]}.kv{int(node[-1]) // 2}"
                todo += [f"{node}<q>", f"{shared}<k>", f"{shared}<v>"]
            todo += [node] * (node[0] == "m")
    kept = np.asarray(apart.routes(0.15))
    assert {e for e, k in zip(graph.edges, kept, strict=True) if k} == reached
    assert 0 < len(reached) < len(strong)
    assert flow.routes(0.0).all() and not flow.routes(1.0).any()


def test_information_flow__compared_with_scores_of_edges__agrees_with_their_sizes(graph, flow):
    clean = jnp.ones(3)
    of = lambda x, over="edge", graph=graph: Scores(x, clean, graph, (over,), "exact", "resample", "mean")
    assert float(flow.compare(of(-flow.importance)).pearson) == pytest.approx(1)
    some = jnp.where(
        jnp.arange(len(graph.edges)) % 3 == 0, flow.importance, jnp.nan
    )  # the others were not asked for
    assert float(flow.compare(of(some)).spearman) == pytest.approx(1)
    rng = np.random.default_rng(0)
    found = flow.compare(of(jnp.asarray(rng.normal(size=len(graph.edges)), jnp.float32)), 9)
    assert abs(float(found.pearson)) < 0.4 and found.n == 9
    with pytest.raises(ArgumentError, match=r"those to compare with are over=\('node',\) of Graph"):
        flow.compare(of(jnp.ones(len(graph.nodes)), "node"))


def test_information_flow__bad_input__is_explained(model, graph, pair, flow):
    with pytest.raises(
        ArgumentError, match=r"threshold=1\.5: importances, and so what is asked of them, lie between"
    ):
        flow.routes(1.5)
    with pytest.raises(ArgumentError, match="chunk_size=0: at least one token"):
        mj.attribution.information_flow(model, pair[0], graph=graph, chunk_size=0)
    with pytest.raises(ArgumentError, match="graph is of another model: it has n_layers 3"):
        mj.attribution.information_flow(model, pair[0], graph=mj.graph.Graph(3, 4, 2, True, True, True))
