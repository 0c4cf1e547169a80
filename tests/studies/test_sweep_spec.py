"""Specifications of sweeps: what is wrong is named, with what would be right."""

import json

import pytest

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.studies.sweep_spec import SweepSpec, read_spec, spec_of

TASK = {"model": "tasks-4l", "task": "ioi", "n": 10}
TEXTS = {
    "model": "tasks-4l",
    "clean": ["a b", "c d"],
    "corrupt": ["e f", "g h"],
    "answer": "x",
    "wrong": ["y", "z"],
}


def test_spec__of_a_task__has_parts_of_its_pairs():
    spec = spec_of({**TASK, "batch": 4, "positions": ["S2", "END"], "mesh": [1, 8], "revision": None})
    assert (spec.pairs, spec.parts) == (10, 3)
    assert [spec.part(i) for i in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert spec_of(TASK).parts == 1 and spec_of(TASK).part(0) == slice(0, 10)
    assert spec_of(json.loads(json.dumps(spec.page()))) == spec


def test_spec__of_texts__has_words_and_columns():
    spec = spec_of({**TEXTS, "positions": {"subject": [0, 1]}, "mode": "noise"})
    assert spec.pairs == 2 and spec.answer == ("x",) and spec.wrong == ("y", "z")
    assert spec.positions == {"subject": (0, 1)}
    assert spec_of(spec.page()) == spec
    assert spec_of({**{k: v for k, v in TEXTS.items() if k != "wrong"}, "metric": "prob"}).wrong is None


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            {**TASK, "sites": "z"},
            r"there is no key `sites`. Did you mean `site` or `split`\? Keys are model, site",
        ),
        ({"task": "ioi", "n": 1}, "`model` is missing: a shipped model, a folder"),
        ({**TASK, "model": 3}, 'model` is 3; right would be a text, such as "tasks-4l"'),
        (
            {**TASK, "over": "layer"},
            r"`over` is 'layer'; right would be a list of axes, such as \[\"layer\", \"pos\"\]",
        ),
        ({**TASK, "n": 1.5}, "`n` is 1.5; right would be a whole number from 1"),
        ({**TASK, "n": True}, "`n` is True; right would be a whole number"),
        ({**TASK, "batch": 0}, "`batch` is 0; right would be a whole number from 1"),
        ({**TASK, "seed": -1}, "`seed` is -1; right would be a whole number from 0"),
        ({**TASK, "task": "iou"}, r"`task` is 'iou'; right would be one of agreement, .* Did you mean `ioi`"),
        ({**TASK, "mode": "denoised"}, "right would be one of denoise, noise"),
        ({**TASK, "metric": ["prob"]}, "right would be one of logit_diff, prob, nll, rank"),
        ({**TASK, "mesh": [8]}, r"`mesh` is \[8\]; right would be two whole numbers"),
        ({**TASK, "positions": {"S2": [1]}}, "`positions` of a task is a list of its names"),
        ({**TASK, "answer": "x"}, "`answer` and `wrong` are for texts; a task has its own"),
        ({"model": "m"}, "give one of the two"),
        ({**TASK, **TEXTS}, "give one of the two"),
        ({"model": "m", "task": "ioi"}, "`n` is missing: say how many pairs"),
        ({**TEXTS, "n": 2}, "`n` is for tasks"),
        ({**TEXTS, "corrupt": ["e f"]}, "`clean` has 2 texts and `corrupt` 1: they are pairs"),
        ({k: v for k, v in TEXTS.items() if k != "answer"}, "`answer` is missing: the next word"),
        ({k: v for k, v in TEXTS.items() if k != "wrong"}, "`wrong` is missing: the next word"),
        (
            {**TEXTS, "wrong": ["a", "b", "c"]},
            "`wrong` has 3 words for 2 texts: give one for all, or one each",
        ),
        ({**TEXTS, "positions": ["S2"]}, "of texts it is an object that gives every name"),
        ({**TEXTS, "positions": {"s": [1]}}, "position `s` has 1 columns for 2 texts: one each"),
        (
            {**TEXTS, "positions": {"s": [1, "b"]}},
            "right would be a list of names, or an object of lists of columns",
        ),
    ],
)
def test_spec__that_cannot_be__says_what_would_be_right(page, message):
    with pytest.raises(ArgumentError, match=message):
        spec_of(page)


def test_read_spec__of_a_file__reads_one_json_object(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(TASK))
    assert read_spec(path) == SweepSpec("tasks-4l", task="ioi", n=10)
    with pytest.raises(CheckpointError, match=r"Cannot read `.*none.json`"):
        read_spec(tmp_path / "none.json")
    for text, message in [
        ("{", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"n": 1, "n": 2}', "`n` twice"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_spec(path)
