import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, CheckpointError, ShapeError, WriteError
from mechjax.graph import Graph, from_mib, to_mib

GRAPH = Graph(n_layers=2, n_heads=2, n_kv_heads=2, mlp=True, serial=True, grouped=True)


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
    (tmp_path / "c.json").write_text(json.dumps({"edges": {"a9.h0->m9": {"score": 1, "in_graph": True}}}))
    with pytest.raises(
        CheckpointError, match=r"names 1 edges that the graph does not have, first `a9\.h0->m9`"
    ):
        from_mib(GRAPH, tmp_path / "c.json")
