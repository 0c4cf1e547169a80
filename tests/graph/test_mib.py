import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, CheckpointError, ShapeError, WriteError
from mechjax.graph import Graph, from_mib, to_mib
from tests.tolerances import TOL

GRAPH = Graph(n_layers=2, n_heads=2, n_kv_heads=2, mlp=True, serial=True, grouped=True)
PARALLEL = Graph(n_layers=2, n_heads=2, n_kv_heads=2, mlp=True, serial=False, grouped=True)
ORACLES = Path(__file__).parents[1] / "oracles"


def test_mib__written_and_read__comes_back(tmp_path):
    scores = jax.random.normal(jax.random.key(0), (len(GRAPH.edges),))
    path = to_mib(GRAPH, tmp_path / "c.json", scores=scores, kept=scores > 0.5, d_model=8)
    back, kept = from_mib(GRAPH, path)
    np.testing.assert_array_equal(back, scores)
    np.testing.assert_array_equal(kept, scores > 0.5)


def test_to_mib__its_page__has_the_names_of_the_format(tmp_path):
    kept = jnp.array([edge in ("input->a0.h1<v>", "a0.h1->logits") for edge in GRAPH.edges])
    page = json.loads(to_mib(GRAPH, tmp_path / "c.json", kept=kept, d_model=8).read_text())
    assert page["cfg"] == {"n_layers": 2, "n_heads": 2, "parallel_attn_mlp": False, "d_model": 8}
    assert [name for name, node in page["nodes"].items() if node["in_graph"]] == ["input", "a0.h1", "logits"]
    assert page["edges"]["a0.h1->logits"] == {"score": 0.0, "in_graph": True}
    # 1 + 2 * 3 nodes; per layer q, k, v of two heads, the MLP, and the logits
    assert len(page["edges"]) == (1 + 4) * 6 + (3 + 6) + 7


def test_mib__bad_input__is_explained(tmp_path):
    with pytest.raises(ArgumentError, match="1 readers of keys for 2 heads"):
        to_mib(Graph(2, 2, 1, True, True, True), tmp_path / "c.json", d_model=8)
    with pytest.raises(ShapeError, match=r"`scores` has shape \(3,\) for 46 edges"):
        to_mib(GRAPH, tmp_path / "c.json", scores=jnp.ones(3), d_model=8)
    with pytest.raises(WriteError, match="cannot write the circuit"):
        to_mib(GRAPH, tmp_path / "no" / "c.json", d_model=8)
    with pytest.raises(CheckpointError, match="is no circuit of MIB: FileNotFoundError"):
        from_mib(GRAPH, tmp_path / "none.json")
    with pytest.raises(
        CheckpointError, match=r"c\.pt` is a pickle, .* never read\. Make JSON of it .*from_pt"
    ):
        from_mib(GRAPH, tmp_path / "c.pt")
    (tmp_path / "c.json").write_text(json.dumps({"edges": {"a9.h0->m9": {"score": 1, "in_graph": True}}}))
    with pytest.raises(
        CheckpointError, match=r"names 1 edges that the graph does not have, first `a9\.h0->m9`"
    ):
        from_mib(GRAPH, tmp_path / "c.json")


def its_own(path):
    """What the format has; of other keys `Graph.from_json` of the repository (at 4fad6c6) takes no notice."""
    page = json.loads(path.read_text())
    assert list(page) == ["cfg", "nodes", "edges", "provenance", "sha256"]
    return {name: page[name] for name in ("cfg", "nodes", "edges")}


def test_from_mib__of_a_changed_file_of_ours__is_refused(tmp_path):
    path = to_mib(GRAPH, tmp_path / "c.json", scores=jnp.ones(len(GRAPH.edges)), d_model=8, seed=3)
    assert json.loads(path.read_text())["provenance"]["made_from"][0] == {
        "name": "seed",
        "kind": "number",
        "value": 3,
    }
    path.write_text(path.read_text().replace('"score": 1.0', '"score": 2.0', 1))
    with pytest.raises(CheckpointError, match="was changed after it was written: its checksum differs"):
        from_mib(GRAPH, path)


@pytest.mark.parametrize(("name", "graph"), [("serial", GRAPH), ("parallel", PARALLEL)])
def test_mib__a_circuit_that_the_eap_ig_repository_wrote__is_read_and_written_the_same(tmp_path, name, graph):
    """`tests/oracles/make_eap_ig.py` made it: 20 edges, then pruned."""
    path = ORACLES / f"mib_{name}.json"
    page = json.loads(path.read_text())
    scores, kept = from_mib(graph, path)
    assert {edge: bool(k) for edge, k in zip(graph.edges, kept, strict=True)} == {
        edge: row["in_graph"] for edge, row in page["edges"].items()
    }
    assert 0 < kept.sum() < 20
    again = to_mib(graph, tmp_path / "c.json", scores=scores, kept=kept, d_model=8)
    assert its_own(again) == page


def test_to_mib__what_it_writes__is_read_by_the_eap_ig_repository(tmp_path):
    """It read `mib_ours.json`; this is that file."""
    given = json.loads((ORACLES / "mib_ours.json").read_text())
    scores = jnp.array([given["edges"][edge]["score"] for edge in GRAPH.edges], jnp.float32)
    np.testing.assert_allclose(scores, np.linspace(-1, 1, len(GRAPH.edges)), **TOL["float32", "law"])
    kept = jnp.array([edge.startswith("input->") for edge in GRAPH.edges])
    ours = to_mib(GRAPH, tmp_path / "c.json", scores=scores, kept=kept, d_model=8)
    assert its_own(ours) == given
    with np.load(ORACLES / "eap_ig.npz") as file:
        read = {key: file[f"read/{key}"].tolist() for key in ("edges", "scores", "in_graph", "nodes")}
    assert dict(zip(read["edges"], read["scores"], strict=True)) == dict(
        zip(GRAPH.edges, scores.tolist(), strict=True)
    )
    assert dict(zip(read["edges"], read["in_graph"], strict=True)) == dict(
        zip(GRAPH.edges, kept.tolist(), strict=True)
    )
    assert read["nodes"] == ["input", "logits"]
