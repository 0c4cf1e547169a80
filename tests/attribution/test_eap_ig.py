"""EAP-IG against its completeness sum, EAP at one point, and rules of quadrature against integrals."""

import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution.quadrature import nodes_of
from mechjax.base.errors import ArgumentError
from tests.tolerances import TOL


def out_of_input(scores):
    return float(
        sum(s for s, e in zip(scores.scores, scores.graph.edges, strict=True) if e.startswith("input->"))
    )


def test_eap_ig__edges_out_of_the_input__sum_to_the_difference_of_the_runs(model, graph, pair, metric):
    gap = float((metric(model(pair[0])) - metric(model(pair[1]))).mean())
    few, many = (mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=n) for n in (5, 80))
    plain = mj.attribution.eap(model, *pair, metric, graph=graph)
    errors = [abs(out_of_input(scores) - gap) for scores in (plain, few, many)]
    assert errors[2] < 2e-3 * max(1, abs(gap))
    assert errors[2] < errors[1] < errors[0]
    assert few.method == "eap_ig(steps=5, quadrature='midpoint')"


def test_eap_ig__one_step_at_its_right_end__is_eap(model, graph, pair, metric):
    found = mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=1, quadrature="right")
    plain = mj.attribution.eap(model, *pair, metric, graph=graph)
    np.testing.assert_allclose(found.scores, plain.scores, **TOL["float32", "gradient"])
    np.testing.assert_allclose(found.clean, plain.clean, **TOL["float32", "law"])


def test_eap_ig__clean_equals_corrupt__is_zero(model, graph, pair, metric):
    assert not np.any(mj.attribution.eap_ig(model, pair[0], pair[0], metric, graph=graph, steps=2).scores)


@pytest.mark.parametrize(
    ("rule", "of_line", "of_square"),
    [
        ("left", 3 / 8, 7 / 32),
        ("right", 5 / 8, 15 / 32),
        ("midpoint", 1 / 2, 21 / 64),
        ("trapezoid", 1 / 2, 11 / 32),
    ],
)
def test_nodes_of__every_rule__integrates_a_line_and_a_square(rule, of_line, of_square):
    at, weights = np.array(nodes_of(rule, 4)).T
    np.testing.assert_allclose([weights.sum(), weights @ at, weights @ at**2], [1, of_line, of_square])


def test_eap_ig__bad_input__is_explained(model, graph, pair, metric, as_a_user):
    with pytest.raises(ArgumentError, match="steps=0: the way from corrupt to clean needs at least one step"):
        mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=0)
    with pytest.raises(ArgumentError, match="quadrature='simpson': expected one of 'midpoint', 'left'"):
        mj.attribution.eap_ig(model, *pair, metric, graph=graph, quadrature="simpson")
