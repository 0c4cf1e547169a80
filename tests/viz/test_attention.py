import re

import numpy as np
import pytest

from mechjax.base.errors import ShapeError
from mechjax.viz.arcs import Arc, arcs
from mechjax.viz.attention import attention, shown, tokens_line
from mechjax.viz.bars import BarRow, bars

PATTERN = np.array([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.1, 0.3, 0.6]])


def test_attention__of_a_pattern__shows_the_chosen_row_and_keeps_the_whole():
    page = attention(PATTERN, [" a", " b", " c"], title="L0.H1", query=1)
    shares = re.findall(r'<button type="button" class="tok([^"]*)" style="--v:([\d.]+)"', page)
    assert shares == [("", "0.250"), (" from hi", "0.750"), ("", "0.000")]
    assert re.findall(r"<td class=\"p[^>]*>([\d.]+)</td>", page) == [f"{v:.2f}" for v in PATTERN.ravel()]


def test_attention__by_default__starts_at_the_last_token():
    assert 'data-tip="c → b: 0.30"' in attention(PATTERN, list("abc"), title="L0.H1")


def test_attention__with_other_tokens_than_positions__is_refused():
    with pytest.raises(ShapeError, match=r"shape \(query, key\) = \(3, 3\) was given 2 tokens"):
        attention(PATTERN, ["a", "b"], title="L0.H1")


@pytest.mark.parametrize(
    ("token", "text"), [(" Mary", "Mary"), ("\n", "↵"), (" ", "␣"), ("", "␣"), ("a\tb", "a⇥b")]
)
def test_shown__of_a_token__can_be_seen(token, text):
    assert shown(token) == text


def test_tokens_line__with_roles__writes_them_under_their_words():
    assert '<span class="tok role">b<small>S2</small></span>' in tokens_line(["a", "b"], {1: "S2"})


def test_arcs__between_words__are_drawn_named_and_escaped():
    drawing = arcs(
        ["<a>", "b", "c"], [Arc(0, 2, "L1.H0", 0.84), Arc(1, 2, "<h>", 0.5)], caption="c", roles={2: "END"}
    )
    assert drawing.count('class="arc"') == 2
    assert "L1.H0 84%" in drawing
    assert "&lt;h&gt; 50%" in drawing
    assert "<a>" not in drawing
    assert ">END</text>" in drawing


def test_bars__of_values__are_as_long_as_they_are_large():
    page = bars(
        [
            BarRow("all", 4.0, "4"),
            BarRow("some", 1.0, "1", strong=True, ticks=(2.0,)),
            BarRow("none", -1.0, "−1"),
        ],
        caption="c",
    )
    assert re.findall(r"width:([\d.]+)%", page) == ["100.00", "25.00", "0.00"]
    assert "left:50.00%" in page
    assert page.count('class="strong"') == 1
