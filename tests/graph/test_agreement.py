import numpy as np
import pytest
from scipy import stats

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.graph import agreement
from tests.tolerances import TOL


def test_agreement__scores_with_ties__equals_scipy():
    rng = np.random.default_rng(0)
    truth, scores = rng.normal(size=60), rng.integers(-4, 5, size=60).astype(float)
    found = agreement(scores, truth, 12)
    large = np.abs(truth) >= np.sort(np.abs(truth))[-12]
    u = stats.mannwhitneyu(np.abs(scores)[large], np.abs(scores)[~large]).statistic
    expected = (stats.pearsonr(scores, truth)[0], stats.spearmanr(scores, truth)[0], u / (12 * 48))
    np.testing.assert_allclose(
        [found.pearson, found.spearman, found.auroc], expected, **TOL["float32", "law"]
    )


def test_agreement__the_truth_itself_and_its_reverse__are_the_ends_of_every_scale():
    truth = np.array([5.0, -4.0, 3.0, 2.0, -1.0, 0.5])
    same, turned = agreement(truth, truth, 2), agreement(1 / truth, truth, 2)
    assert [float(x) for x in (same.pearson, same.spearman, same.auroc, same.overlap)] == [1, 1, 1, 1]
    assert (float(turned.auroc), float(turned.overlap)) == (0, 0)
    assert np.isnan(float(agreement(np.ones(6), truth, 2).pearson))


def test_agreement__bad_input__is_explained(as_a_user):
    with pytest.raises(ShapeError, match=r"scores of shape \(2,\) against a truth of shape \(3,\)"):
        agreement(np.ones(2), np.ones(3))
    with pytest.raises(ArgumentError, match="n=3: between 1 and 2 of 3 items"):
        agreement(np.ones(3), np.ones(3), 3)
    with pytest.raises(ArgumentError, match="some scores are NaN"):
        agreement(np.full(3, np.nan), np.ones(3), 1)
