import re

import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ShapeError
from mechjax.viz.heatmap import heatmap, legend, number


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.834, "0.83"), (-0.5, "−0.50"), (-0.001, "0.00"), (float("nan"), "–"), (1.0, "1.00")],
)
def test_number__of_a_value__has_two_decimals_and_a_real_minus(value, text):
    assert number(value) == text


def test_heatmap__of_an_array__holds_every_number_as_text():
    values = np.random.default_rng(0).normal(size=(3, 4))
    page = heatmap(values, list("abc"), list("wxyz"), caption="c")
    assert re.findall(r"<td class=\"[pn][^>]*>([^<]*)</td>", page) == [number(v) for v in values.ravel()]


def test_heatmap__colours__diverge_from_zero_and_stop_at_the_limit():
    page = heatmap(jnp.asarray([[0.0, -1.0, 2.0, jnp.nan]]), ["r"], list("abcd"), caption="c", limit=1.0)
    assert re.findall(r'<td class="(\w+)( \w+)?" style="--v:([\d.]+)"', page) == [
        ("p", "", "0.000"), ("n", " hi", "1.000"), ("p", " hi", "1.000"),
    ]  # fmt: skip
    assert '<td class="gap">–</td>' in page


def test_heatmap__of_zeros__divides_by_nothing():
    assert 'style="--v:0.000"' in heatmap(np.zeros((1, 1)), ["r"], ["c"], caption="c")


def test_heatmap__names_tips_and_marks__are_there_and_escaped():
    page = heatmap(
        np.ones((1, 2)),
        ["<r>"],
        ["a", "b"],
        caption="c",
        under=["", "<u>"],
        marked=[(0, 1)],
        tip=lambda i, j: f"<{i},{j}>",
    )
    assert "&lt;r&gt;" in page
    assert "<small>&lt;u&gt;</small>" in page
    assert page.count("data-mark") == 1
    assert 'data-tip="&lt;0,1&gt;"' in page


def test_heatmap__of_groups__names_each_once_beside_its_rows():
    page = heatmap(np.ones((3, 1)), list("abc"), ["x"], caption="c", groups=["<g>", "<g>", "h"])
    found = re.findall(
        r'<th scope="rowgroup" rowspan="(\d)" class="group">([^<]*)</th><th scope="row">(\w)', page
    )
    assert found == [("2", "&lt;g&gt;", "a"), ("1", "h", "c")]
    assert page.count("<tbody>") == 2 and 'colspan="2"' in page
    with pytest.raises(ShapeError, match=r"and 1 groups: give one name per row"):
        heatmap(np.ones((3, 1)), list("abc"), ["x"], caption="c", groups=["g"])


def test_heatmap__of_another_shape_than_its_names__is_refused():
    with pytest.raises(
        ShapeError, match=r"shape \(row, column\) = \(2, 2\) was given 1 row names, 2 column names"
    ):
        heatmap(np.ones((2, 2)), ["a"], ["b", "c"], caption="c")


def test_legend__of_three_words__has_them_in_order():
    assert re.findall(r"<span>(\w)</span>", legend("a", "b", "c")) == ["a", "b", "c"]
