"""Views of scores: what is drawn, where, in which colour, and what is refused."""

import dataclasses
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
from tests.needs import BROWSER
from tests.viz.chromium import browser

GRAPH = Graph(3, 4, 2, True, True, True)
SPANS = dataclasses.replace(GRAPH, spans=("IO", "<b>S2</b>", "END"))
UNITS = dataclasses.replace(GRAPH, units=((0, 7), (), (12345,)))
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


def at_spans(**changes):
    """Scores of edges at spans, zero but for a few."""
    values = np.zeros(len(SPANS.edges))
    for name, value in {
        "a0.h1->a1.h2<q> @ END": 3.0, "a0.h1->a1.h2<q> @ IO": -2.0, "a0.h1->a1.h2<q> @ <b>S2</b>": 0.5,
        "m2->logits @ END": -1.5, "input->m0 @ <b>S2</b>": 1.0,
    }.items():  # fmt: skip
        values[SPANS.number(name)] = value
    return dataclasses.replace(scored(values, graph=SPANS), **changes)


def rows_of(page):
    """What each row of the table of edges says."""
    found = re.findall(r'<tr data-edge="\d+">(.*?)</tr>', page)
    return [re.findall(r">([^<]+)<", row) for row in found]


def test_circuit__at_spans__lists_each_pair_at_its_strongest_span():
    page = circuit(at_spans(method="exact")).html
    assert rows_of(page) == [
        ["a0.h1", "a1.h2", "q", "END", "+3"], ["m2", "logits", "END", "−1.5"],
        ["input", "m0", "&lt;b&gt;S2&lt;/b&gt;", "+1"],
    ]  # fmt: skip
    assert "a0.h1-&gt;a1.h2&lt;q&gt; @ END: +3 (@ IO −2, @ &lt;b&gt;S2&lt;/b&gt; +0.5)" in page
    assert len(drawn(page)) == 3
    pairs = len(SPANS.edges) // 3
    assert f"The 3 strongest of {pairs} pairs of a node and a reader, each at the span where it" in page
    assert "together they hold 69% of the size of all scores." in page  # 5.5 of 8
    assert "<b>S2" not in page


def test_circuit__at_spans__begins_with_where_sizes_are():
    page = circuit(at_spans()).html
    where, _, rest = page.partition("pairs of a node and a reader")
    assert re.findall(r'<th scope="row">([^<]*)</th>', where) == ["logits", "layer 2", "layer 1", "layer 0"]
    assert re.findall(r'<td class="p[^>]*>([^<]*)</td>', where) == [
        "0.0", "0.0", "1.5", "0.0", "0.0", "0.0", "2.0", "0.5", "3.0", "0.0", "1.0", "0.0",
    ]  # fmt: skip
    assert "layer 1 @ IO: 2" in where
    assert 'class="map"' not in rest and 'class="map"' not in circuit(scored(np.ones(len(GRAPH.edges)))).html


def test_circuit__at_one_span__draws_and_lists_its_edges_alone():
    page = circuit(at_spans(), at="IO").html
    assert rows_of(page) == [["a0.h1", "a1.h2", "q", "IO", "−2"]]
    assert f"The 1 strongest of {len(SPANS.edges) // 3} edges at IO; together they hold 100% of" in page
    assert page.count("data-mark=") == 4, "the span's column is framed"


def test_circuit__at_positions__takes_their_numbers():
    graph = dataclasses.replace(GRAPH, spans=("0", "1"))
    page = circuit(scored(np.arange(len(graph.edges)), graph=graph), n=2, at=1).html
    assert [row[-2] for row in rows_of(page)] == ["1", "1"]
    assert "edges that are read at a layer and a position" in page


def test_circuit__of_some_exact_scores__counts_those_alone():
    values = np.full(len(GRAPH.edges), np.nan)
    values[[3, 8]] = -1, 0.5
    assert "The 2 strongest of 2 edges; together they hold 100%" in circuit(scored(values)).html


def test_circuit__of_units__draws_them_beside_their_mlp():
    values = np.zeros(len(UNITS.edges))
    for name in ("m0.n7->logits", "a0.h1->m2.n12345", "m0->m2", "m2->logits"):
        values[UNITS.number(name)] = 1
    page = circuit(scored(values, graph=UNITS)).html
    box = r'data-node="([^"]+)" data-tip="[^"]*"><rect x="([\d.]+)" width="([\d.]+)"[^>]*></rect><text[^>]*>(\w+)<'
    boxes = {name: (float(x), float(w), label) for name, x, w, label in re.findall(box, page)}
    assert boxes["m0"][0] == boxes["m2"][0], "whole MLPs stand below each other"
    assert boxes["m0.n7"][2] == "n7" and boxes["m0.n7"][0] > sum(boxes["m0"][:2])
    assert boxes["m2.n12345"][1] >= 6 * 6.9, "a long name fits its box"
    assert "m0.n0: none of the edges shown" in page


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


def test_node_map__at_spans__has_a_row_for_each_node_by_layer():
    graph = dataclasses.replace(SPANS, units=((5,), (), ()))
    values = np.arange(len(graph.places)) / 10
    page = node_map(scored(values, "node", graph)).html
    assert re.findall(r'<th scope="row">([^<]*)</th>', page) == list(graph.nodes)
    assert re.findall(r'rowspan="(\d+)" class="group">([^<]*)<', page) == [
        ("1", ""), ("6", "layer 0"), ("5", "layer 1"), ("5", "layer 2"),
    ]  # fmt: skip
    assert re.findall(r'<td class="p[^>]*>([^<]*)</td>', page) == [f"{value:.1f}" for value in values]
    assert "a0.h0, &lt;b&gt;S2&lt;/b&gt;: +0.4" in page and "<b>S2" not in page


def test_node_map__of_units__shows_them_apart_in_colours_of_their_own():
    values = np.zeros(len(UNITS.nodes))
    values[[UNITS.nodes.index(name) for name in ("m1", "m0.n7", "m2.n12345")]] = 8, 0.02, -0.01
    page = node_map(scored(values, "node", UNITS)).html
    heads, _, units = page.partition("units of MLPs")
    assert re.findall(r'<th scope="col"><b>([^<]*)</b>', heads) == ["h0", "h1", "h2", "h3", "MLP"]
    assert re.findall(r'scope="row">([^<]*)</th><td class="\w[^>]*>([^<]*)<', units) == [
        ("m0.n0", "0.000"), ("m0.n7", "0.020"), ("m2.n12345", "−0.010"),
    ]  # fmt: skip
    assert re.findall(r"<span>(\S+) hurts", page) == ["−8", "−0.02"]


def test_node_map__of_more_nodes_than_can_be_read__shows_the_strongest():
    graph = dataclasses.replace(UNITS, units=(tuple(range(500)), (), ()))
    values = np.arange(len(graph.nodes)) / 1e3
    page = node_map(scored(values, "node", graph), n=3).html
    assert "the 160 strongest of 500" in page
    assert re.findall(r'scope="row">(m0[^<]*)</th>', page) == [f"m0.n{i}" for i in range(340, 500)]


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
    with pytest.raises(
        ArgumentError, match=r"at='END': these scores are of a graph that sums positions, .*build"
    ):
        circuit(scores, at="END")
    with pytest.raises(ArgumentError, match=r"at='end': the graph has IO, <b>S2</b>, END"):
        circuit(at_spans(), at="end")
    numbered = dataclasses.replace(GRAPH, spans=tuple("01234"))
    with pytest.raises(ArgumentError, match=r"at=5: the graph has positions 0 to 4"):
        circuit(scored(np.ones(len(numbered.edges)), graph=numbered), at=5)


def test_scores__in_a_notebook__lead_with_the_strongest(scores):
    page = scores._repr_html_()
    found = re.findall(r"<td style='[^']*'>([^<]*)</td><td style='[^']*color-mix[^']*'>([^<]*)</td>", page)
    escape = lambda name: name.replace("<", "&lt;").replace(">", "&gt;")
    assert found == [(escape(name), f"{value:.4g}") for name, value in scores.top(12)]


@pytest.mark.browser
@BROWSER
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
