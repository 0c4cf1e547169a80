"""Integrated gradients of all layers at once, and padding; layer by layer they are tested with attribution patching."""

import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError
from tests.tolerances import TOL


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


@pytest.mark.slow
def test_attribution_patch__named_positions_and_padding__are_those_columns(model, pair, metric):
    named = {"first": jnp.array([0, 1, 2]), "end": jnp.array([4, 4, 4])}
    pad = ((0, 0), (2, 0))
    mask = jnp.asarray(np.pad(np.ones((3, 5), bool), pad))
    padded = [mj.Prompts(jnp.asarray(np.pad(ids, pad, constant_values=9)), mask) for ids in pair]
    found = mj.attribution.attribution_patch(model, *pair, metric, site="z", over=("layer", "pos", "head"))
    other = mj.attribution.attribution_patch(
        model, *padded, metric, site="z", over=("head", "pos", "layer"),
        positions={name: at + 2 for name, at in named.items()},
    )  # fmt: skip
    assert other.scores.shape == (4, 2, 2)
    for j, at in enumerate(named.values()):
        columns = np.stack([found.per_example[:, at[i], :, i] for i in range(3)], -1)
        np.testing.assert_allclose(
            other.per_example[:, j], columns.transpose(1, 0, 2), **TOL["float32", "gradient"]
        )
    assert "@ first" in str(other.top(16))


def test_integrated_gradients__bad_input__is_explained(model, pair, metric, as_a_user):
    with pytest.raises(ArgumentError, match="steps=0: the way from ablated to clean needs at least one step"):
        mj.attribution.integrated_gradients(model, *pair, metric, steps=0)
    with pytest.raises(ArgumentError, match="quadrature='simpson': expected one of 'midpoint', 'left'"):
        mj.attribution.integrated_gradients(model, *pair, metric, quadrature="simpson")
