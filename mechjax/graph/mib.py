"""Circuits in the JSON of MIB's circuit track (Mueller et al. 2025, arXiv:2504.13151) and of EAP-IG, and back.

A file holds `cfg` (layers, heads, whether parallel, d_model), `nodes` (name -> in_graph) and `edges` (name -> score and
in_graph). Edges have the names of a graph made with `grouped=False`. Positive scores help the metric there too. The
other format, a `.pt`, is a pickle: it is refused, with what makes JSON of it.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from mechjax.base.atomic import replace_file
from mechjax.base.errors import ArgumentError, CheckpointError, ShapeError, WriteError
from mechjax.base.provenance import provenance_of
from mechjax.base.signed import signed, unsigned
from mechjax.graph.build import Graph


def to_mib(
    graph: Graph,
    path: str | Path,
    *,
    scores: Float[Array, " edge"] | None = None,
    kept: Bool[Array, " edge"] | None = None,
    d_model: int,
    **made_from: Any,
) -> Path:
    """Write scores of edges, a circuit, or both.

    Beside the format's own keys stand where they come from, and a checksum; the authors' code takes no notice of them.

    Args:
        graph: The graph, every head with keys and values of its own.
        path: The file.
        scores: One score per edge; zero where not given.
        kept: The edges that are in the circuit; none where not given. Nodes that any of these leaves are in it too.
        d_model: Width of the model, which the format names.
        **made_from: What they were made from, as `mj.save` takes it, such as `model=model`.

    Raises:
        ArgumentError: A graph whose heads share keys, or without MLPs: the format has no name for either.
        ShapeError: Not one number per edge.
        WriteError: The file cannot be written.
    """
    if not graph.mlp or graph.n_kv_heads != graph.n_heads:
        raise ArgumentError(
            "MIB's format gives every head keys and values of its own, and every layer an MLP; this graph has "
            f"{graph.n_kv_heads} readers of keys for {graph.n_heads} heads and {'an' if graph.mlp else 'no'} MLP. "
            "Make it with mj.graph.build(model, grouped=False)."
        )
    n = len(graph.whole("MIB's format").edges)
    score = np.zeros(n) if scores is None else np.asarray(scores, np.float64)
    inside = np.zeros(n, bool) if kept is None else np.asarray(kept, bool)
    for name, values in (("scores", score), ("kept", inside)):
        if values.shape != (n,):
            raise ShapeError(f"`{name}` has shape {values.shape} for {n} edges: give one number per edge.")
    leaves = set(graph.table[inside, 0].tolist())
    page = {
        "cfg": {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "parallel_attn_mlp": not graph.serial,
                "d_model": d_model},
        "nodes": {name: {"in_graph": i in leaves} for i, name in enumerate(graph.nodes)}
        | {"logits": {"in_graph": True}},
        "edges": {
            name: {"score": float(s), "in_graph": bool(k)}
            for name, s, k in zip(graph.edges, score, inside, strict=True)
        },
        "provenance": provenance_of(**made_from).page(),
    }  # fmt: skip
    path = Path(path)
    try:
        replace_file(path, signed(page))
    except OSError as error:
        raise WriteError(f"cannot write the circuit to `{path}`: {error.strerror}.") from error
    return path


def from_mib(graph: Graph, path: str | Path) -> tuple[Float[Array, " edge"], Bool[Array, " edge"]]:
    """Scores and circuit from such a file, in the order of `graph.edges`.

    A file with a checksum, as `to_mib` writes them, is compared with it. Edges that the file does not name are not in
    the circuit, and their score is zero.

    Raises:
        CheckpointError: The file cannot be read, is no such file, or names edges that the graph does not have.
    """
    if Path(path).suffix == ".pt":
        raise CheckpointError(
            f"`{path}` is a pickle, which could run code and is never read. Make JSON of it where it was made, with "
            "the authors' eap.graph.Graph.from_pt(path).to_json(...), and read that."
        )
    try:
        data = Path(path).read_bytes()
        page: Any = json.loads(data)
        if {"sha256", "provenance"} & set(page):
            page = unsigned(data)
        rows = {name: (float(edge["score"]), bool(edge["in_graph"])) for name, edge in page["edges"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"`{path}` is no circuit of MIB: {type(error).__name__}: {error}. Its JSON has `edges`, each a name with "
            "`score` and `in_graph`."
        ) from error
    unknown = [name for name in rows if name not in graph]
    if unknown:
        raise CheckpointError(
            f"`{path}` names {len(unknown)} edges that the graph does not have, first `{unknown[0]}`: is it of another "
            "model, or the graph not made with mj.graph.build(model, grouped=False)?"
        )
    found = [rows.get(name, (0.0, False)) for name in graph.edges]
    scores = jnp.asarray([0.0 if math.isnan(score) else score for score, _ in found], jnp.float32)
    return scores, jnp.asarray([inside for _, inside in found], bool)
