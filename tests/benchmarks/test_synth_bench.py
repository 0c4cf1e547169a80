"""The comparison on SynthSAEBench's world: its committed page, and that both libraries find the same."""

import json

import numpy as np
import pytest

from benchmarks.synth_bench import PAGE, ROWS, apart, page, spread
from benchmarks.synth_recipes import RECIPES


@pytest.fixture(scope="module")
def found():
    return json.loads(ROWS.read_text())


def test_page__is_made_from_the_committed_rows(found):
    assert PAGE.read_text() == page(found)
    sides = {(row["kind"], row["side"]) for row in found["rows"]}
    assert sides == {(kind, side) for kind in RECIPES for side in ("mechjax", "saelens")}


def test_apart__by_hand__is_the_difference_over_the_spread_of_one_run():
    a, b = np.array([0.5, 0.54, 0.52]), np.array([0.47, 0.49, 0.48])
    assert spread(a) == pytest.approx(0.02) and spread(np.ones(1)) == 0
    assert apart(a, b) == pytest.approx(0.04 / np.sqrt((0.02**2 + 0.01**2) / 2))
    assert apart(np.full(3, 0.7), np.full(3, 0.71)) == pytest.approx(-5)  # no less than 0.002


def test_committed_scores__are_those_of_saelens_within_two_deviations_of_a_run(found):
    """What is found and made; how many latents are active hangs on thresholds that both learn, and is on the page."""
    for kind in RECIPES:
        for score in ("f1", "mcc", "explained"):
            a, b = (
                np.array([row[score] for row in found["rows"] if (row["kind"], row["side"]) == (kind, side)])
                for side in ("mechjax", "saelens")
            )
            assert len(a) == len(b) == 3 and abs(apart(a, b)) <= 2, (kind, score)
