"""Integrated gradients of whole models; layer by layer they are tested with attribution patching."""

import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError


@pytest.mark.slow
@pytest.mark.parametrize(("site", "over"), [("z", ("head",)), ("embed", ("pos",))])
@pytest.mark.parametrize("quadrature", ["midpoint", "left", "right", "trapezoid"])
def test_integrated_gradients__of_all_at_once__sum_to_what_ablating_all_does(
    model, pair, metric, site, over, quadrature
):
    donor = mj.capture(model, site)(pair[1])[1]
    gap = (metric(model(pair[0])) - metric(mj.run(model, pair[0], edits=mj.replace(site, donor)))).mean()
    found = mj.attribution.integrated_gradients(
        model, *pair, metric, site=site, over=over, steps=200, quadrature=quadrature
    )
    error = 0.1 if quadrature in ("left", "right") else 0.01
    assert float(found.scores.sum()) == pytest.approx(float(gap), rel=error)
    assert np.abs(found.scores).max() > 0.01


def test_integrated_gradients__bad_input__is_explained(model, pair, metric, as_a_user):
    with pytest.raises(ArgumentError, match="steps=0: the way from corrupt to clean needs at least one step"):
        mj.attribution.integrated_gradients(model, *pair, metric, steps=0)
    with pytest.raises(ArgumentError, match="quadrature='simpson': expected one of 'midpoint', 'left'"):
        mj.attribution.integrated_gradients(model, *pair, metric, quadrature="simpson")
