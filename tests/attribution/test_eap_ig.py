"""EAP-IG against its completeness sum, EAP at one point, and rules of quadrature against integrals."""

import inspect
from functools import partial

import numpy as np
import pytest

import mechjax as mj
from mechjax.attribution.quadrature import nodes_of
from mechjax.base.errors import ArgumentError
from tests.compilations import assert_numbers_are_data
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
    assert few.method == "eap_ig(path='inputs', steps=5, quadrature='midpoint')"


def test_eap_ig__on_the_mask__sums_to_the_difference_of_the_runs(model, graph, pair, metric):
    gap = float((metric(model(pair[0])) - metric(model(pair[1]))).mean())
    found = mj.attribution.eap_ig(model, *pair, metric, graph=graph, path="mask", steps=80)
    assert float(found.scores.sum()) == pytest.approx(gap, abs=2e-3 * max(1, abs(gap)))
    assert found.method == "eap_ig(path='mask', steps=80, quadrature='midpoint')"


def test_eap_ig__on_activations__sums_for_each_sublayer_to_what_its_ablation_takes(
    model, graph, pair, metric
):
    found = mj.attribution.eap_ig(model, *pair, metric, graph=graph, path="activations", steps=40)
    acts = mj.capture(model, ["resid_pre", "z", "mlp_out"])(pair[1])[1]
    edits = {"input->": mj.replace("resid_pre", acts["resid_pre"][0], layer=0)}
    for layer in range(2):
        edits[f"a{layer}."] = mj.replace("z", acts["z"][layer], layer=layer)
        edits[f"m{layer}->"] = mj.replace("mlp_out", acts["mlp_out"][layer], layer=layer)
    for name, edit in edits.items():
        effect = float((metric(model(pair[0])) - metric(mj.intervene(model, [edit])(pair[0]))).mean())
        own = sum(s for s, e in zip(found.scores, graph.edges, strict=True) if e.startswith(name))
        assert float(own) == pytest.approx(effect, abs=4e-3 * max(1, abs(effect))), name


def test_eap_ig__one_trapezoid__is_the_mean_of_the_slopes_of_both_runs(model, graph, pair, metric):
    found = mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=1, quadrature="trapezoid")
    clean, turned = (mj.attribution.eap(model, *p, metric, graph=graph).scores for p in (pair, pair[::-1]))
    np.testing.assert_allclose(found.scores, (clean - turned) / 2, **TOL["float32", "gradient"])


def test_eap_ig__one_step_at_its_right_end__is_eap(model, graph, pair, metric):
    found = mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=1, quadrature="right")
    plain = mj.attribution.eap(model, *pair, metric, graph=graph)
    np.testing.assert_allclose(found.scores, plain.scores, **TOL["float32", "gradient"])
    np.testing.assert_allclose(found.clean, plain.clean, **TOL["float32", "law"])


def test_eap_ig__clean_equals_corrupt__is_zero(model, graph, pair, metric):
    assert not np.any(mj.attribution.eap_ig(model, pair[0], pair[0], metric, graph=graph, steps=2).scores)


@pytest.mark.parametrize(("path", "steps"), [("inputs", 5), ("activations", 40), ("mask", 80)])
def test_eap_ig__on_every_path__other_numbers_compile_nothing_and_equal_prompts_give_zero(
    model, graph, pair, metric, caplog, path, steps
):
    run = partial(mj.attribution.eap_ig, model, graph=graph, path=path, steps=steps)
    assert_numbers_are_data(run, pair, metric, caplog)


def test_eap_ig__by_default__is_five_midpoints_on_inputs():
    given = inspect.signature(mj.attribution.eap_ig).parameters
    assert {name: given[name].default for name in ("path", "steps", "quadrature", "reduce")} == {
        "path": "inputs", "steps": 5, "quadrature": "midpoint", "reduce": "mean",
    }  # fmt: skip


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
    with pytest.raises(ArgumentError, match="steps=0: the way from ablated to clean needs at least one step"):
        mj.attribution.eap_ig(model, *pair, metric, graph=graph, steps=0)
    with pytest.raises(
        ArgumentError, match="path='outputs': expected one of 'inputs', 'activations', 'mask'"
    ):
        mj.attribution.eap_ig(model, *pair, metric, graph=graph, path="outputs")
    with pytest.raises(ArgumentError, match="reduce='mean_of_abs' needs path='inputs'"):
        mj.attribution.eap_ig(model, *pair, metric, graph=graph, path="mask", reduce="mean_of_abs")
    with pytest.raises(ArgumentError, match="quadrature='simpson': expected one of 'midpoint', 'left'"):
        mj.attribution.eap_ig(model, *pair, metric, graph=graph, quadrature="simpson")
