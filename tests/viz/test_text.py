import io

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from mechjax.patching import PatchScores
from mechjax.viz.scores import scores_page, scores_text
from mechjax.viz.text import heat_table


def _printed(renderable):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(renderable)
    return console.file.getvalue()


def _scores(*shape, over, mode="denoise"):
    values = jnp.arange(float(np.prod(shape))).reshape(shape) / 10
    return PatchScores(values, values[..., None], jnp.ones(1), jnp.zeros(1), "z", over, mode)


def test_heat_table__of_an_array__prints_names_and_numbers():
    text = _printed(heat_table(np.array([[0.5, -1.0], [0.0, np.nan]]), ["[red]a", "b"], ["x", "y"]))
    assert [line.split() for line in text.splitlines()] == [
        ["x", "y"],
        ["[red]a", "0.50", "−1.00"],
        ["b", "0.00", "–"],
    ]


def test_scores_text__of_two_axes__prints_the_table_and_the_leading_places():
    text = _printed(scores_text(_scores(2, 3, over=("layer", "pos")), names={"pos": ["a", "b", "c"]}, top=2))
    assert "layer 0 layer 1" in text
    assert text.rstrip().endswith("0.50  layer 1, c\n  0.40  layer 1, b")


def test_scores_text__of_one_axis__prints_the_leading_places():
    assert "0.20  head 2" in _printed(scores_text(_scores(3, over=("head",))))


def test_scores_page__of_one_two_or_three_axes__shows_a_table():
    for shape, over in (
        ((3,), ("head",)),
        ((2, 3), ("layer", "head")),
        ((2, 3, 4), ("layer", "head", "pos")),
    ):
        page = scores_page(_scores(*shape, over=over), title="t")
        assert page.body.count("<td class=") == (3 if len(shape) == 1 else 6) + 1  # and the corner


def test_scores_page__of_noise__says_which_run_went_into_which():
    assert (
        "run on the clean prompt"
        in scores_page(_scores(2, 2, over=("layer", "pos"), mode="noise"), title="t").body
    )
