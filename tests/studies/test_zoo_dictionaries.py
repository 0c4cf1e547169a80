"""The shipped dictionaries are as good as their cards say, and the script that trained them still runs."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.dictionaries.formats.load import zoo
from mechjax.studies import zoo_dictionaries
from mechjax.studies.zoo_dictionaries import (
    CAUSAL,
    CONTROLS,
    HELD_OUT,
    LIKE,
    MODEL,
    TASKS,
    Options,
    card,
    effects,
    held_out,
    measured,
    named,
    train,
)

LAYERS = Options(Path()).layers


@pytest.fixture(scope="module")
def model():
    return mj.load(MODEL)


@pytest.fixture(scope="module")
def cards():
    return {layer: json.loads((zoo()[named(layer)] / "card.json").read_text()) for layer in LAYERS}


def test_shipped__are_small_and_whole():
    assert set(zoo()) == {named(layer) for layer in LAYERS}
    names = {"README.md", "card.json", "cfg.json", "sae_weights.safetensors"}
    assert all({path.name for path in folder.iterdir()} == names for folder in zoo().values())
    assert sum(path.stat().st_size for folder in zoo().values() for path in folder.iterdir()) < 1_000_000


@pytest.mark.parametrize(
    "layer", [pytest.param(n, marks=pytest.mark.slow) if n == LAYERS[0] else n for n in LAYERS]
)
def test_shipped__on_held_out_rows__are_as_their_card_says(layer, model, cards, monkeypatch):
    """On rows of another seed than those that the card was measured on."""
    monkeypatch.setattr(zoo_dictionaries, "HELD_OUT", HELD_OUT + 1)
    dictionary, said = mj.dictionaries.load(named(layer)), cards[layer]
    found = measured(*model, dictionary, layer, held_out(*model, dictionary, layer, n=6), n=6)
    assert abs(found["fvu"] - said["fvu"]) < 0.1 * said["fvu"]
    assert abs(found["l0"] - said["l0"]) < 0.05 * said["l0"]
    assert abs(found["gamma"] - said["gamma"]) < 0.01
    assert abs(found["ce_recovered"] - said["ce_recovered"]) < 0.002
    assert found["fvu"] < 0.06 and found["ce_recovered"] > 0.98 and found["dead"] < 0.1


@pytest.mark.slow
def test_shipped__a_latent_of_a_task__does_five_times_what_others_of_like_density_do(model, cards):
    """On held-out prompts of a seed that the card knows nothing of."""
    layer, task = LAYERS[-1], "pronouns"
    dictionary, said = mj.dictionaries.load(named(layer)), cards[LAYERS[-1]]["tasks"][task]
    pairs = TASKS[task](model[1], 48, seed=77, split="test")
    density = np.asarray(held_out(*model, dictionary, layer, n=6).density)
    own = density[said["latent"]]
    like = np.flatnonzero((density >= own / LIKE) & (density <= own * LIKE) & (density > 0))
    others = np.random.default_rng(5).choice(like[like != said["latent"]], CONTROLS, replace=False)
    spliced = mj.dictionaries.splice(model[0], {layer: dictionary})
    effect, *rest = effects(spliced, pairs, layer, [said["latent"], *others.tolist()])
    assert effect > CAUSAL * np.median(np.abs(rest))
    assert effect > 0.2 * said["metric"], "and by itself: it carries a good part of the answer"
    assert abs(effect - said["effect"]) < 0.25 * said["effect"]


def test_cards__text__states_what_was_measured(cards):
    for layer, said in cards.items():
        text = (zoo()[named(layer)] / "README.md").read_text()
        assert text == card(said)
        for task, of in said["tasks"].items():
            assert f"| {task} | {of['latent']} | {of['density']:.4f} | {of['metric']:.2f} |" in text
        whole = [of for of in said["tasks"].values() if of["any"]["controls"] == CONTROLS]
        assert all(of["effect"] >= CAUSAL * of["any"]["median"] for of in whole)
        assert len(whole) >= 3


def test_load__of_a_name_that_is_nearly_right__says_which():
    with pytest.raises(CheckpointError, match=r"Did you mean `tasks-4l-resid_post-2`"):
        mj.dictionaries.load("tasks-4l-resid_post2")
    with pytest.raises(ArgumentError, match="revision='main' is for names on the Hub"):
        mj.dictionaries.load(named(LAYERS[0]), revision="main")


@pytest.mark.slow
def test_script__few_steps__leave_a_dictionary_that_loads_and_its_card(tmp_path):
    # As from the command line, where nobody has made JAX strict about dtypes.
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        small = {
            "BATCH": 64,
            "BUFFER": 256,
            "CHOSEN_FROM": 4,
            "TESTED": 4,
            "CONTROLS": 3,
            "ROWS": 4,
            "CANDIDATES": 2,
        }
        for name, value in small.items():
            patch.setattr(zoo_dictionaries, name, value)
        found = train(Options(tmp_path, steps=3), 1)
    folder = tmp_path / named(1)
    loaded = mj.dictionaries.load(folder)
    assert (loaded.d_model, loaded.n_features) == (128, found["features"])
    assert json.loads((folder / "card.json").read_text()) == found
    assert all(f"| {task} | " in (folder / "README.md").read_text() for task in TASKS)
