"""Every record of patching and attribution with two axes as a page: its numbers, and what they mean."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

import mechjax.attribution
import mechjax.patching
from mechjax.attribution import InformationFlow, NodeScores, Scores, SiteScores
from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.graph import Graph
from mechjax.patching import KnockoutScores, MediationEffects, PathScores, TraceScores
from mechjax.viz.record_maps import SHOWN
from mechjax.viz.scores import scores_page

ONE = jnp.ones(1)
GRAPH = Graph(2, 2, 2, True, True, True)
MADE = {"method": "eap", "ablation": "zero", "reduce": "mean"}


def steps(*shape):
    """Numbers of both signs, the last the largest."""
    return jnp.arange(float(np.prod(shape))).reshape(shape) / 10 - 0.25


def cells(page):
    return re.findall(r'<td class="[pn][^>]*>([^<]*)</td>', page.body)


def test_scores_page__of_each_record__shows_its_numbers_and_says_what_they_are():
    grid, per = steps(2, 3), steps(2, 3, 1)
    flow = jnp.arange(float(len(GRAPH.edges)))
    for record, says, n in (
        (SiteScores(grid, per, ONE, "z", ("layer", "head"), (), **MADE), ("Method eap", "+0.25 helps"), 6),
        (PathScores(grid, per, ONE, ("<a>", "b"), ("c", "d", "e"), "all"), ("&lt;a&gt;", "on the way: all"), 6),
        (TraceScores(grid, per, ONE, ONE, jnp.ones(()), "resid_post", 1), ("state of one layer", "gives back"), 6),
        (KnockoutScores(steps(4), steps(4, 1), ONE, 3), ("window of 3", "layer 3"), 4),
        (MediationEffects(*[steps(4, 2, 3)] * 3, steps(4, 2, 3, 1), "z", ("layer", "pos"), "difference", 0.95),
         ("<h2>direct</h2>", "<h2>indirect</h2>", "<h2>interaction</h2>"), 18),
        (InformationFlow(flow, GRAPH), ("L1 heads", "L0 MLP", "logits"), 1 + 3 + 4 + 6 + 7),
    ):  # fmt: skip
        page = scores_page(record)
        assert page.title == type(record).__name__
        assert all(word in page.body for word in says), type(record)
        assert len(cells(page)) == n, type(record)
    assert page.html.count("sizes") > 1, "importances have no sign"


def test_scores_page__of_nodes__has_a_map_for_each_site_in_the_same_colours():
    sites = {"z": steps(2, 3), "q": 2 * steps(2, 3)}
    record = NodeScores(
        sites, {name: x[..., None] for name, x in sites.items()}, ONE, None,
        tuple((name, ("layer", "pos")) for name in sites), (("pos", ("IO", "<b>", "END")),), **MADE,
    )  # fmt: skip
    page = scores_page(record, title="t")
    assert re.findall(r"<h2>(\w)</h2>", page.body) == ["z", "q"]
    assert "&lt;b&gt;" in page.body and "<b><b>" not in page.body
    assert page.body.count("--v:1.000") == 2, "the largest of both sites, at either end"
    assert record._repr_html_().index("q L0 @ IO") < record._repr_html_().index("z L0 @ IO")


def test_scores_page__of_more_axes_or_long_ones__shows_the_largest_and_says_so():
    values = jnp.zeros((2, 70, 3)).at[1, 69, 2].set(-0.5).at[0, 1, 0].set(0.25)
    page = scores_page(SiteScores(values, values[..., None], ONE, "z", ("layer", "pos", "head"), (), **MADE))
    assert "the largest over head; of 70 pos the 64 with the largest" in page.body
    assert 'data-tip="layer 1, pos 69, head 2: −0.50"' in page.body
    assert len(cells(page)) == 2 * 64


def test_every_record__with_two_axes__has_a_view():
    kinds = [
        kind for module in (mechjax.attribution, mechjax.patching) for kind in vars(module).values()
        if isinstance(kind, type) and issubclass(kind, Record)
    ]  # fmt: skip
    elsewhere = {"Scores": "mj.viz.circuit and node_map", "Diagnosis": "a list of nodes"}
    parts = ("FeatureAttribution", "HeadAttribution", "TranscoderConnections", "DeEmbedding", "CircuitPaths")
    elsewhere |= dict.fromkeys(parts, "a list of parts by name, which the record prints")
    assert {kind.__name__ for kind in kinds} - {kind.__name__ for kind in SHOWN} == set(elsewhere)


def test_scores_page__of_a_record_without_a_view__names_those_that_have_one():
    scores = Scores(jnp.zeros(len(GRAPH.edges)), ONE, GRAPH, ("edge",), **MADE)
    with pytest.raises(
        ArgumentError, match=r"no heat map of a Scores: .* PatchScores, .* mj\.viz\.circuit draws"
    ):
        scores_page(scores)


def test_records__of_three_axes_in_a_notebook__lead_with_the_largest():
    values = jnp.zeros((2, 3, 2)).at[1, 2, 0].set(-3)
    record = SiteScores(values, values[..., None], ONE, "z", ("layer", "pos", "head"), (), **MADE)
    assert "L1.H0 @ 2</td>" in record._repr_html_()
