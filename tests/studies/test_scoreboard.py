"""The scoreboard: its numbers by hand, what is committed, and that it judges as it should."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.cli import main
from mechjax.studies.ground_truth import MODELS, program
from mechjax.studies.scoreboard import METHODS, Scoreboard, auroc, scoreboard
from mechjax.studies.scoreboard_page import interval, page, read, write

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
    assert (tmp_path / "scoreboard.md").read_text() == page(rows)
    assert "| rasp/count |" in capsys.readouterr().out


def test_committed_page__is_made_from_the_committed_results():
    rows = read(BENCHMARKS)
    assert (BENCHMARKS / "scoreboard.md").read_text() == page(rows)
    assert {row["model"] for row in rows} == set(MODELS)
    assert {row["method"] for row in rows} == set(METHODS)


def committed(column, method, *, gates=False):
    rows = [row for row in read(BENCHMARKS) if row["method"] == method]
    return np.array(
        [row[column] for row in rows if gates or not row["model"].startswith("gate/")], np.float64
    )


def test_committed_results__random_reads_half_and_exact_finds_the_circuit():
    low, high = interval(committed("edge_auroc", "random", gates=True))
    assert low < 0.5 < high
    assert high - low < 0.15
    assert committed("edge_auroc", "exact").mean() > 0.97
    assert interval(committed("edge_auroc", "eap_ig"))[0] > 0.8
    assert np.nanmean(committed("node_auroc", "exact")) > 0.97
    np.testing.assert_allclose(committed("pearson", "exact"), 1, atol=1e-4)


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
