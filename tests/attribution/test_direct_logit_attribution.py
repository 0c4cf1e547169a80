"""Direct logit attribution of a metric against the decomposition of its logits."""

import numpy as np
import pytest

import mechjax as mj
from tests.tolerances import TOL

POST = {"norms": "both", "out_bias": False, "norm": "rms"}


@pytest.mark.parametrize(
    "changes",
    [POST, pytest.param({}, marks=pytest.mark.slow), pytest.param({"residual": "parallel_shared"}, marks=pytest.mark.slow)],
    ids=["norms after", "norms before", "one norm"],
)  # fmt: skip
@pytest.mark.slow
def test_direct_logit_attribution__against_zero__is_what_heads_add_to_the_logits(
    small, draw, pair, metric, changes
):
    model = draw(small(**changes))
    found = mj.attribution.direct_logit_attribution(
        model, pair[0], None, metric, over=("layer", "pos", "head"), ablation="zero"
    )
    acts = mj.capture(model, mj.decompose.sites(model))(pair[0])[1]
    parts = mj.decompose.logit_attribution(model, acts, metric.correct, metric.wrong, of="heads")
    heads = np.stack([parts[f"L{i // 4}.H{i % 4}"][:, -1] for i in range(8)])
    np.testing.assert_allclose(found.per_example[:, -1].reshape(8, 3), heads, **TOL["float32", "attribution"])
    assert np.abs(heads).max() > 0.01
    assert (
        np.abs(found.scores[:, :-1]).max() < 1e-7
    )  # earlier positions say nothing to the last one's logits directly
