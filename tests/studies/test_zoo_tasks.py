"""The shipped model is as good as its card says, and the script that trained it still runs."""

import json
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import pytest

import mechjax as mj
from mechjax.fit import restore_checkpoint, saved_steps
from mechjax.models.load import zoo
from mechjax.studies import zoo_tasks
from mechjax.studies.zoo_tasks import REQUIRED, TASKS, Options, accuracies, card, configured, train
from mechjax.tasks.vocabulary import vocabulary


@pytest.fixture(scope="module")
def folder() -> Path:
    return zoo()["tasks-4l"]


@pytest.fixture(scope="module")
def shipped():
    return mj.load("tasks-4l")


def test_shipped__size__is_at_most_eight_megabytes(folder: Path):
    assert (folder / "model.safetensors").stat().st_size <= 8_000_000
    assert {path.name for path in folder.iterdir()} >= {"config.json", "tokenizer.json", "README.md"}


def test_shipped__config_and_vocabulary__are_those_of_the_script(shipped):
    model, tokenizer = shipped
    assert replace(model.config, source=None) == configured(len(vocabulary()))
    ids = tokenizer.backend.get_vocab()
    assert tuple(sorted(ids, key=lambda word: ids[word])) == vocabulary()


@pytest.fixture(scope="module")
def recomputed(shipped) -> dict[str, float]:
    return accuracies(*shipped, n=500)


@pytest.mark.parametrize("task", TASKS)
def test_shipped__held_out_accuracy__is_what_is_required(task: str, recomputed: dict[str, float]):
    assert recomputed[task] >= REQUIRED[task]


def test_shipped__unseen_pairs_of_ioi__are_right_in_both_orders(shipped):
    model, tokenizer = shipped
    pairs = mj.tasks.ioi(tokenizer, 400, seed=71)
    right = pairs.right(model(pairs.clean))
    for order in (
        pairs.positions["IO"] < pairs.positions["S1"],
        pairs.positions["IO"] > pairs.positions["S1"],
    ):
        assert right[order].mean() >= 0.99


def test_shipped__corrupt_prompts__are_answered_the_other_way(shipped):
    model, tokenizer = shipped
    pairs = mj.tasks.ioi(tokenizer, 200)
    metric = mj.metrics.logit_diff(pairs.correct, pairs.wrong)
    assert (metric(model(pairs.corrupt), pairs.corrupt.mask) < 0).mean() >= 0.99


def test_card__its_numbers__are_those_that_were_measured(folder: Path, recomputed: dict[str, float]):
    measured, text = json.loads((folder / "card.json").read_text()), (folder / "README.md").read_text()
    for task, accuracy in measured["accuracy"].items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {task} |"))
        assert f"| {accuracy:.1%} |" in row
        assert abs(accuracy - recomputed[task]) < 0.03  # other prompts
    assert f"{measured['parameters']:,} parameters" in text
    assert measured["seconds"] < 20 * 60


def test_card__spread__is_over_five_seeds(folder: Path):
    assert "5 seeds" in (folder / "README.md").read_text().replace("\n", " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("zoo") / "run"
    # As from the command line, where nobody has made JAX strict about dtypes.
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        for name, value in {"BATCH": 2, "TESTED": 4}.items():
            patch.setattr(zoo_tasks, name, value)
        yield out, train(Options(out, seed=3, steps=2, checkpoints=3))


@pytest.mark.slow
def test_script__two_steps__leave_a_model_that_loads_and_its_checkpoints(run):
    out, measured = run
    model, tokenizer = mj.load(out)
    assert tokenizer.vocab_size == measured["vocabulary"] == model.config.d_vocab
    assert model.config.n_params == measured["parameters"]
    assert saved_steps(out / "checkpoints") == (0, 1, 2)
    assert eqx.tree_equal(restore_checkpoint(out / "checkpoints", 2, model), model)
    assert not eqx.tree_equal(restore_checkpoint(out / "checkpoints", 0, model), model)


@pytest.mark.slow
def test_script__its_card__states_every_task_and_the_spread(run):
    _, measured = run
    other = measured | {"seed": 4, "accuracy": dict.fromkeys(TASKS, 0.5)}
    text = card(measured, [other])
    assert "2 seeds (3, 4)" in text.replace("\n", " ")
    assert all(f"| {task} | " in text for task in TASKS)


def test_script__the_same_seed__gives_the_same_start():
    start = zoo_tasks.mimetic(mj.init(configured(50), key=jax.random.key(0)), jax.random.key(1))
    again = zoo_tasks.mimetic(mj.init(configured(50), key=jax.random.key(0)), jax.random.key(1))
    assert eqx.tree_equal(start, again)
