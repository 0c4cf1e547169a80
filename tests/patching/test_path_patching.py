"""Path patching against three whole runs with edits, and direct paths against exact scores of edges."""

import re
from typing import ClassVar

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, PairingError
from mechjax.metrics.answers import LogitDiff
from tests.patching.small import METRIC, PAIR, redrawn
from tests.tolerances import TOL

SWEEP = TOL["float32", "sweep"]
SENDERS = ("input", "a0.h1", "m0", ("a1.h0", "m1"))
RECEIVERS = ("a1.h1<q>", ("a2.kv0<v>", "m1"), "m2", "logits")
POST = {"norms": "both", "out_bias": False, "residual": "parallel", "mlp": "gated", "norm": "rms"}


@pytest.fixture(scope="module")
def model():
    return redrawn()


@pytest.fixture(scope="module")
def graph(model):
    return mj.graph.build(model)


def place(reader):
    """The site, layer and head of a reader."""
    if reader == "logits":
        return "resid_post", 2, {}
    if reader[0] == "m":
        return "mlp_in", int(reader[1:]), {}
    layer, head, letter = re.fullmatch(r"a(\d)\.\w+(\d)<(\w)>", reader).groups()
    axis = "head" if letter == "q" else "kv_head"
    return f"{letter}_input", int(layer), {axis: int(head)}


def three_runs(model, senders, receivers, freeze):
    """Clean and corrupt runs; the clean one with senders patched and heads frozen; the clean one with receivers patched."""
    sites = ["resid_pre", "z", "mlp_out"]
    clean, corrupt = (mj.capture(model, sites)(ids)[1] for ids in PAIR)
    frozen = ["z", "mlp_out"] if freeze == "all" else ["z"]
    edits = [mj.replace(site, clean[site], per_layer=True) for site in frozen]
    for node in senders:
        layer = 0 if node == "input" else int(node[1])
        head = {"head": int(node[-1])} if node[0] == "a" else {}
        site = {"i": "resid_pre", "a": "z", "m": "mlp_out"}[node[0]]
        edits += [mj.replace(site, corrupt[site][layer], layer=layer, **head)]
    places = [place(reader) for reader in receivers]
    seen = mj.capture(mj.intervene(model, edits), sorted({site for site, _, _ in places}))(PAIR[0])[1]
    edits = [mj.replace(site, seen[site][layer], layer=layer, **head) for site, layer, head in places]
    return METRIC(model(PAIR[0])) - METRIC(mj.intervene(model, edits)(PAIR[0]))


def members(group):
    return [group] if isinstance(group, str) else list(group)


class Counted(LogitDiff):
    """Counts how often it is traced."""

    traces: ClassVar[list[int]] = []

    def of(self, logits):
        self.traces.append(1)
        return super().of(logits)


COUNTED = Counted(METRIC.pos, METRIC.correct, METRIC.wrong)


def sweep(model, graph, senders=SENDERS, receivers=RECEIVERS, corrupt=PAIR[1], **more):
    return mj.patching.path_patching(
        model,
        PAIR[0],
        corrupt,
        COUNTED,
        graph=graph,
        senders=senders,
        receivers=receivers,
        chunk_size=3,
        **more,
    )


@pytest.mark.parametrize(
    ("freeze", "cells"),
    [("heads", [(0, 0), (3, 2)]), pytest.param("all", [(1, 1), (0, 3)], marks=pytest.mark.slow)],
    ids=["heads", "all"],
)
def test_path_patching__groups_of_every_kind__equal_three_runs(model, graph, freeze, cells):
    found = sweep(model, graph, freeze=freeze)
    for i, j in cells:
        expected = three_runs(model, members(SENDERS[i]), members(RECEIVERS[j]), freeze)
        np.testing.assert_allclose(found.per_example[i, j], expected, **SWEEP)
        assert abs(float(found.scores[i, j])) > 1e-3
    np.testing.assert_allclose(found.scores, found.per_example.mean(-1), **SWEEP)
    np.testing.assert_allclose(found.clean, METRIC(model(PAIR[0])), **SWEEP)
    np.testing.assert_allclose(found.per_example[3, 0], 0, atol=1e-6)  # nothing leads back


def test_path_patching__one_direct_path__is_its_edge_cut(model, graph):
    found, live = (sweep(model, graph, freeze=freeze) for freeze in ("all", "heads"))
    ablated, clean = mj.graph.writes(model, PAIR[1]), METRIC(model(PAIR[0]))
    for i, j in ((0, 0), (1, 2), (2, 3)):
        kept = np.ones(len(graph.edges), np.float32)
        kept[graph.number(f"{SENDERS[i]}->{RECEIVERS[j]}")] = 0
        logits = mj.graph.masked_forward(model, PAIR[0], jnp.asarray(kept), ablated, graph=graph)
        np.testing.assert_allclose(found.per_example[i, j], clean - METRIC(logits), **SWEEP)
    assert np.abs(found.scores - live.scores)[0].min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, POST], ids=["grouped", "norms after"])
def test_path_patching__all_direct_paths__are_the_exact_scores_of_edges(changes):
    model = redrawn(**changes)
    graph = mj.graph.build(model)
    found = sweep(model, graph, None, graph.readers, freeze="all")
    exact = mj.attribution.exact(model, *PAIR, METRIC, graph=graph)
    np.testing.assert_allclose(graph.flat(found.scores[..., None]), exact.scores, **SWEEP)


def test_path_patching__other_groups__compile_nothing_and_print_their_names(model, graph):
    sweep(model, graph)
    before = len(COUNTED.traces)
    other = (("m0", "a1.h1"), "a0.h0", "m2", "m1"), ("a2.h0<q>", ("a1.h0<q>", "logits"), "m1", "a1.kv0<v>")
    found = sweep(model, graph, *other)
    assert len(COUNTED.traces) == before > 0
    assert "m0+a1.h1 -> a2.h0<q>" in {name for name, _ in found.top(16)}
    np.testing.assert_allclose(sweep(model, graph, *other, corrupt=PAIR[0]).scores, 0, atol=1e-6)


def test_path_patching__bad_input__is_explained(model, graph, as_a_user):
    def refused(message, error=ArgumentError, corrupt=PAIR[1], **more):
        with pytest.raises(error, match=message):
            mj.patching.path_patching(model, PAIR[0], corrupt, METRIC, **{"graph": graph} | more)

    refused(
        r"senders: the graph has no node `a0.h7`; its 10 are named like .* Did you mean `a0.h1`",
        senders=["a0.h7"],
    )
    refused("receivers: the graph has no reader `a1.h1`.* Did you mean `a1.h1<q>`", receivers="a1.h1")
    refused(r"senders=\[\(\)\]: name at least one in every group", senders=[()])
    refused("freeze='mlps': expected 'heads'", freeze="mlps")
    refused("chunk_size=0: at least one group of senders", chunk_size=0)
    refused("graph is of another model: it has n_layers 4", graph=mj.graph.Graph(4, 2, 1, True, True, True))
    refused("pair 0 has 5 clean and 4 corrupt tokens", PairingError, corrupt=PAIR[1][:, :4])
    broken = eqx.tree_at(lambda m: m.blocks.mlp.W_in, model, model.blocks.mlp.W_in.at[1].set(jnp.nan))
    with pytest.raises(ArgumentError, match="`mlp_out` of layer 1 is not finite in this run"):
        sweep(broken, graph)
