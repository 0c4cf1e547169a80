"""The README's examples run as they stand, and what they say is so."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.models.families import FAMILIES, OTHERS
from tests.needs import torch_bridge
from tests.tolerances import TOL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SCREEN, TRAINING, DICTIONARIES, DEVICES, SUBJECTS, BRIDGED = re.findall(
    r"```python\n(.*?)```", README, re.DOTALL
)


def _run(code: str) -> dict:
    space: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it, and as optax needs it
        exec(compile(code, "README.md", "exec"), space)
    return space


def test_screen__as_it_stands__gives_what_its_comments_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it saves a record
    space = _run(SCREEN)
    assert mj.verify("results/ioi").ok
    told = [one.name for one in mj.provenance("results/ioi").made_from]
    assert told == ["model", "clean", "corrupt", "metric"]
    config = space["model"].config
    assert space["acts"]["pattern"].shape[:3] == (config.n_layers, 1, config.n_heads)
    assert space["grads"]["resid_pre"].shape == (config.n_layers, 1, 15, config.d_model)
    assert space["scores"].recovered.shape == (config.n_layers, 15)
    assert space["scores"].recovered[0, 10] == pytest.approx(1.0, abs=1e-4)  # only that token differs
    assert float(space["scores"].clean[0]) > 0 > float(space["scores"].corrupt[0])
    assert space["scores"].top(3)[0][0].startswith("L")
    assert "resid_post" in space["sites"]
    assert "a1.h3->a2.h0<q>" in dict(space["edges"].top(3))  # the edge whose cut takes most


@pytest.mark.slow
def test_training__in_ten_lines__learns_to_repeat():
    body = [line for line in TRAINING.split("\n\n", 1)[1].splitlines() if line]
    assert len(body) == 10
    space = _run(TRAINING)
    assert float(space["value"]) < 0.05
    assert isinstance(space["model"], mj.models.Decoder)


@pytest.mark.slow
def test_dictionaries__of_the_shipped_model__give_what_their_comments_say():
    space = _run(DICTIONARIES)
    fvu, prompts = space["trained"].history["fvu"], space["prompts"]
    assert fvu.shape == (80,) and fvu[-1] < 0.3 < fvu[0]
    np.testing.assert_array_equal(space["seen"](prompts[0]), space["model"](prompts[0]))
    assert space["acts"]["resid_post.latents"].shape == (1, *prompts[0].tokens.shape, 512)
    assert 0.5 < float(space["passed"].ce_recovered) <= 1.01


def test_commands__of_the_readme__are_the_ones_that_set_everything_up():
    assert "pip install -e . && mechjax tour" in README
    assert "pip install -e '.[test]' && pytest -n 2" in README
    assert (ROOT / "notebooks" / "tour.png").stat().st_size < 400_000


def test_glossary__of_the_readme__has_twelve_words():
    table = README.split("## Twelve words")[1].split("##")[0]
    assert len(re.findall(r"^\| (?!word|---)", table, re.M)) == 12


def test_families__of_the_readme__are_all_there_with_measured_parity():
    table = README.split("<!-- families")[1].split("<!-- end of families -->")[0]
    row = r"^\| (\w+) \| (.*?) \| (\S+|has none) \| (\d+) \| (\S+) \|$"
    rows = {found[0]: found for found in re.findall(row, table, re.M)}
    assert list(rows) == [family.name for family in (*FAMILIES, *OTHERS)]
    for family in (*FAMILIES, *OTHERS):
        _, architectures, logits, sites, worst = rows[family.name]
        assert tuple(re.findall(r"`(\w+)`", architectures)) == family.architectures
        assert float(worst) <= 1e-5
        assert logits == "has none" or float(logits) <= 1e-5
        assert int(sites) > 10


def test_devices__as_they_stand__share_the_work():
    space = _run(DEVICES)
    config = space["model"].config
    assert dict(space["mesh"].shape) == {"data": 2, "model": 4}
    assert {s.data.shape for s in space["acts"]["z"].addressable_shards} == {
        (config.n_layers, 8, space["clean"].tokens.shape[1], 1, config.d_head)
    }
    assert space["scores"].scores.shape == (config.n_layers, config.n_heads)
    assert space["plan"].share.fits and space["dry"].share.fits


def test_subjects__as_they_stand__are_patched_and_attributed():
    space = _run(SUBJECTS)
    scores, first_order = space["scores"], space["first_order"]
    assert scores.scores.shape == (3, 8) and space["plan"].n_params == 3 * (8 * 8 + 8) + 8 * 5 + 5
    # Without nonlinearities the first order is all there is.
    moved = scores.per_example - scores.corrupt
    np.testing.assert_allclose(moved, first_order.per_example, atol=1e-4)


@pytest.mark.slow
def test_bridged__as_it_stands__is_captured_edited_and_patched():
    torch_bridge()
    space = _run(BRIDGED)
    logits, acts, clean = space["logits"], space["acts"], space["clean"]
    np.testing.assert_allclose(
        logits, space["module"](space["torch"].tensor(clean)).logits.detach(), **TOL["float32", "parity"]
    )
    assert acts["mlp_out"].shape == acts["model.layers.self_attn.output"].shape == (2, 4, 8, 32)
    changed = np.abs(space["ablated"] - logits).max((0, 2)) > 1e-4
    assert changed.tolist() == [False] * 7 + [True]  # the last layer, at the last position
    assert space["scores"].scores.shape == (2, 8)
