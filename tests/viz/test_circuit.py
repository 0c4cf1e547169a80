"""Views of scores: what is drawn, where, in which colour, and what is refused."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.attribution import Scores
from mechjax.base.errors import ArgumentError
from mechjax.graph import Graph
from mechjax.viz.attributed import figure
from mechjax.viz.circuit import circuit
from mechjax.viz.edge_graph import Drawn, edge_graph
from mechjax.viz.node_map import node_map
from tests.viz.chromium import BINARY, browser

GRAPH = Graph(3, 4, 2, True, True, True)
CLEAN = jnp.ones(2)


def scored(values, over="edge", graph=GRAPH):
    return Scores(jnp.asarray(values, jnp.float32), CLEAN, graph, (over,), "eap", "resample", "mean")


@pytest.fixture(scope="module")
def scores():
    """Every edge has a size of its own; a third of them hurt."""
    n = len(GRAPH.edges)
    values = np.random.default_rng(0).permutation(np.arange(1, n + 1)) / n
    return scored(np.where(np.arange(n) % 3, values, -values))


def drawn(page):
    """(name, sign, tip, end of the curve) of every edge."""
    found = re.findall(
        r'<g class="edge (\w)" data-edge="(\d+)" data-from="([^"]+)" data-to="([^"]+)" data-tip="([^"]+)">'
        r'<path d="M([\d.]+) ([\d.]+)C[^"]* ([\d.]+) ([\d.]+)" class="hit"></path>',
        page,
    )
    return {int(i): (sign, u, v, tip, *map(float, at)) for sign, i, u, v, tip, *at in found}


def test_circuit__of_scores__draws_the_largest_and_lists_them_in_order(scores):
    page, top = circuit(scores, n=25).html, scores.top(25)
    edges = drawn(page)
    tips = [f"{name}: {figure(value)}" for name, value in top]
    escaped = [tip.replace("<", "&lt;").replace(">", "&gt;") for tip in tips]
    assert [edges[i][3] for i in range(25)] == escaped
    assert [edges[i][0] for i in range(25)] == ["p" if value > 0 else "n" for _, value in top]
    assert re.findall(r'<td class="[pn][^>]*>([^<]*)</td>', page) == [figure(value) for _, value in top]
    held = sum(abs(value) for _, value in top) / float(jnp.abs(scores.scores).sum())
    assert f"The 25 strongest of {len(GRAPH.edges)} edges; together they hold {held:.0%}" in page


def test_circuit__every_edge__rises_and_ends_where_its_reader_reads(scores):
    edges = drawn(circuit(scores, n=10_000).html)
    assert len(edges) == len(GRAPH.edges)
    assert all(y0 > y1 for *_, y0, _, y1 in edges.values())
    ends = {}
    for i, (name, _) in enumerate(scores.top(10_000)):
        ends.setdefault(name.split("->")[1], set()).add(edges[i][-2:])
    ends.pop("logits")  # edges spread along it
    assert all(len(places) == 1 for places in ends.values())
    assert len(set.union(*ends.values())) == len(ends), "no two readers share a place"


def test_circuit__twice__is_the_same_file_and_says_nothing_of_zeros(scores):
    few = scored(jnp.zeros(len(GRAPH.edges)).at[5].set(-0.25))
    assert circuit(few).html == circuit(few).html
    assert "The 1 strongest of" in circuit(few).html
    assert "The 0 strongest of" in circuit(scored(jnp.zeros(len(GRAPH.edges)))).html


def test_edge_graph__names_from_elsewhere__are_escaped():
    text = edge_graph(["input"], ["logits"], [Drawn(0, "input", "logits", 1.0, "<b>")], caption="<i>")
    assert "&lt;b&gt;" in text and "&lt;i&gt;" in text
    assert "<b>" not in text and "<i>" not in text


def test_node_map__of_scores__puts_every_node_in_its_layer():
    values = np.arange(len(GRAPH.nodes)) / 100
    page = node_map(scored(values, "node"), n=3).html
    found = re.findall(r'<td class="p[^>]*data-tip="([^"]*)">([^<]*)</td>', page)
    assert found == [
        (f"{name}: {figure(value)}", f"{value:.2f}")
        for name, value in zip(GRAPH.nodes[1:], values[1:], strict=True)
    ]
    assert re.findall(r"<li>([^<]*)</li>", page) == ["m2: +0.15", "a2.h3: +0.14", "a2.h2: +0.13"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "+0.0123"), (-1.5, "−1.5"), (0.0, "0"), (123456.0, "+1.23e+05")]
)
def test_figure__of_a_score__has_a_sign_and_three_digits(value, text):
    assert figure(value) == text


def test_views__of_what_they_do_not_show__say_which_does(scores):
    with pytest.raises(
        ArgumentError, match=r"scores over edge, and this view shows .* node: use mj\.viz\.circuit"
    ):
        node_map(scores)
    with pytest.raises(ArgumentError, match=r"scores over node, .* use mj\.viz\.node_map"):
        circuit(scored(np.ones(len(GRAPH.nodes)), "node"))
    with pytest.raises(ArgumentError, match="n=0 edges asked for"):
        circuit(scores, n=0)


def test_scores__in_a_notebook__lead_with_the_strongest(scores):
    page = scores._repr_html_()
    found = re.findall(r"<td style='[^']*'>([^<]*)</td><td style='[^']*color-mix[^']*'>([^<]*)</td>", page)
    escape = lambda name: name.replace("<", "&lt;").replace(">", "&gt;")
    assert found == [(escape(name), f"{value:.4g}") for name, value in scores.top(12)]


@pytest.mark.browser
@pytest.mark.skipif(
    BINARY is None, reason="a browser is needed and no dependency brings one: apt-get install chromium"
)
def test_browser__pointing_at_a_row__lights_its_edge_alone(scores, tmp_path):
    path = circuit(scores, n=25).write(tmp_path / "page.html")
    point = "document.querySelector('{}').dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}))"
    lit = "[...document.querySelectorAll('g.edge.on')].map((edge) => edge.dataset.edge)"
    with browser() as tab:
        tab.look()
        tab.open(path)
        tab.js(point.format('tr[data-edge="3"] td'))
        assert tab.js(lit) == ["3"]
        node = scores.top(1)[0][0].split("->")[0]
        tab.js(point.format(f'[data-node="{node}"]'))
        touching = [
            i for i, (name, _) in enumerate(scores.top(25))
            if node in (name.split("->")[0], name.split("->")[1].partition("<")[0])
        ]  # fmt: skip
        assert sorted(map(int, tab.js(lit))) == touching
        assert (tab.requests, tab.complaints) == ([], [])
