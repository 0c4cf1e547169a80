"""The scoreboard: its numbers by hand, what is committed, and that it judges as it should."""

from inspect import isfunction
from itertools import product
from pathlib import Path

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.cli import main
from mechjax.studies.ground_truth import MODELS, program
from mechjax.studies.judged_methods import METHODS
from mechjax.studies.scoreboard import Scoreboard, auroc, scoreboard
from mechjax.studies.scoreboard_page import interval, page, read, write
from tests.attribution import transcoded
from tests.tolerances import TOL

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_auroc__by_hand__counts_pairs_and_ties_as_half():
    rng = np.random.default_rng(0)
    scores, inside = rng.integers(-3, 4, 40).astype(np.float32), rng.random(40) < 0.3
    pairs = [(abs(a), abs(b)) for a, b in product(scores[inside], scores[~inside])]
    right = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auroc(scores, inside) == pytest.approx(right)
    assert auroc(np.zeros(40, np.float32), inside) == 0.5
    assert np.isnan(auroc(scores, np.ones(40, bool)))


def test_interval__of_draws__holds_the_mean_and_narrows():
    draws = np.random.default_rng(1).normal(size=400)
    low, high = interval(draws)
    assert low < draws.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * draws.std() / 20, rel=0.1)
    assert interval(np.array([0.5, np.nan, 0.5])) == (0.5, 0.5)
    assert np.isnan(interval(np.array([np.nan]))).all()


def test_program__reversed__has_pairs_that_show_its_circuit():
    known = program("reverse", 0)
    found = {known.graph.edges[i] for i in np.flatnonzero(known.varying)}
    assert found == {"input->a2.h0<v>", "a2.h0->logits"}  # where to look follows from the length alone
    gap = known.metric(known.model(known.clean), None) - known.metric(known.model(known.corrupt), None)
    np.testing.assert_allclose(gap, 2, atol=0.1)  # one answer is 1 and the other 0, and then the reverse


@pytest.mark.slow
def test_scoreboard__from_the_command_line__judges_and_writes(tmp_path, capsys):
    options = ["--models", "rasp/count", "--methods", "random", "exact", "eap", "--seeds", "2"]
    assert main(["scoreboard", "--folder", str(tmp_path), *options]) == 0
    rows = read(tmp_path)
    assert {(row["method"], row["seed"]) for row in rows} == set(product(("random", "exact", "eap"), (0, 1)))
    of_exact = [row for row in rows if row["method"] == "exact"]
    assert [row["edge_auroc"] for row in of_exact] == [1.0, 1.0]
    assert [round(row["pearson"], 3) for row in of_exact] == [1.0, 1.0]
    draws = [row["pearson"] for row in rows if row["method"] == "random"]
    assert draws[0] != draws[1]
    assert_committed(rows)
    assert (tmp_path / "scoreboard.md").read_text() == page(rows)
    assert "| rasp/count |" in capsys.readouterr().out


def test_committed_page__is_made_from_the_committed_results():
    rows = read(BENCHMARKS)
    assert (BENCHMARKS / "scoreboard.md").read_text() == page(rows)
    assert {row["model"] for row in rows} == set(MODELS)
    assert {"random", *FLOORS} == {row["method"] for row in rows} == set(METHODS)


def test_methods__of_attribution__all_have_a_row():
    methods = {name for name, it in vars(mj.attribution).items() if isfunction(it)}
    methods -= {"diagnose", *transcoded.METHODS}
    assert methods == {name.partition("/")[0] for name in METHODS} - {"random"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("of_edges", "of_nodes"), [("eap", "attribution_patch"), ("eap_ig/activations", "integrated_gradients")]
)
def test_methods_of_activations__without_norms__are_sums_over_edges_in_the_same_order(of_edges, of_nodes):
    known = MODELS["gate/cancelling_or"](0)
    found, sums = (
        np.asarray(METHODS[name].score(known, jax.random.key(0)).nodes) for name in (of_nodes, of_edges)
    )
    assert np.isnan(found).tolist() == [True] + [False] * 8  # the input, then what each layer writes
    assert np.count_nonzero(found[1:]) > 0
    np.testing.assert_allclose(found[1:], sums[1:], **TOL["float32", "gradient"])


NUMBERS = ("edge_auroc", "node_auroc", "pearson", "spearman", "passes")


def assert_committed(rows):
    known = {tuple(row[k] for k in ("model", "method", "seed")): row for row in read(BENCHMARKS)}
    for row in rows:
        expected = known[row["model"], row["method"], row["seed"]]
        found, expected = ([np.nan if of[n] is None else of[n] for n in NUMBERS] for of in (row, expected))
        np.testing.assert_allclose(found, expected, **TOL["float32", "attribution"])


@pytest.mark.slow
def test_committed_results__of_two_models__are_what_a_fresh_run_gives():
    assert_committed(scoreboard(("rasp/shift", "gate/cancelling_and"), ("random", *FLOORS), n_seeds=1).rows())


def committed(column, method, *, gates=False):
    rows = [row for row in read(BENCHMARKS) if row["method"] == method]
    return np.array(
        [row[column] for row in rows if gates or not row["model"].startswith("gate/")], np.float64
    )


@pytest.mark.parametrize("column", ["edge_auroc", "node_auroc"])
def test_committed_results__of_random_scores__read_one_half(column):
    drawn = committed(column, "random", gates=True)
    low, high = interval(drawn)
    assert abs(np.nanmean(drawn) - 0.5) <= 0.02
    assert low <= 0.5 <= high or 0.48 < low < high < 0.52


FLOORS = {  # method -> least mean AUROC of edges and of nodes outside gates, a little under what was measured
    "exact": (0.999, 0.999),
    "eap": (0.92, 0.99),
    "eap/relp": (0.92, 0.99),
    "eap/attnlrp": (0.91, 0.99),
    "eap/gim": (0.99, 0.99),
    "eap_ig": (0.98, 0.99),
    "eap_ig/activations": (0.99, 0.99),
    "eap_ig/mask": (0.99, 0.99),
    "information_flow": (0.65, None),
    "contextual_decomposition": (None, 0.99),
    "attribution_patch": (None, 0.99),
    "atp_star": (None, 0.99),
    "integrated_gradients": (None, 0.99),
    "direct_logit_attribution": (None, 0.98),
}


def test_committed_results__of_every_method__find_circuits_as_well_as_they_did():
    for method, floors in FLOORS.items():
        for column, floor in zip(("edge_auroc", "node_auroc"), floors, strict=True):
            found = committed(column, method)
            assert np.isnan(found).all() if floor is None else np.nanmean(found) > floor
    np.testing.assert_allclose(committed("pearson", "exact"), 1, atol=1e-4)
    np.testing.assert_allclose(committed("spearman", "exact"), 1, atol=1e-4)


def test_scoreboard__of_what_is_not_there__says_what_is(tmp_path):
    with pytest.raises(ArgumentError, match="there is no model `gpt2`: there are rasp/reverse, "):
        scoreboard(["gpt2"])
    with pytest.raises(ArgumentError, match="there is no method `acdc`: there are random, exact, "):
        scoreboard(methods=["acdc"])
    with pytest.raises(ArgumentError, match="n_seeds=0: at least one"):
        scoreboard(n_seeds=0)
    with pytest.raises(CheckpointError, match=r"scoreboard\.json` holds no scoreboard.*mechjax scoreboard"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    cells = {
        name: np.zeros((1, 1, 1))
        for name in ("edge_auroc", "node_auroc", "pearson", "spearman", "seconds", "passes")
    }
    with pytest.raises(WriteError, match="cannot write the scoreboard to"):
        write(Scoreboard(**cells, models=("m",), methods=("a",)), tmp_path / "file")
