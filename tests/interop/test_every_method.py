"""Every public function on a subject: it runs, and equals an oracle in Flax alone, or refuses and says what to use."""

import functools
import inspect

import jax
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import NeedsDecoderError
from mechjax.models.needs import REASONS
from tests.interop import by_hand, table
from tests.interop.rows import RUNS
from tests.tolerances import TOL


@pytest.mark.parametrize("name", RUNS)
def test_function__on_a_subject__equals_the_oracle(name):
    found, expected = RUNS[name].check()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **TOL["float32", "gradient"])


def test_oracle__of_other_prompts__differs():
    found, _ = RUNS["patching.activation_patch"].check()
    assert np.abs(found - by_hand.patched(by_hand.CLEAN, by_hand.CORRUPT)).max() > 1e-2


@pytest.mark.parametrize("name", table.refused())
def test_function__that_needs_a_decoder__says_why_and_what_to_use(name):
    fn = functools.reduce(getattr, name.split("."), mj)
    taken = inspect.signature(fn).parameters.values()
    given = {p.name: None for p in taken if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
    need = REASONS[fn.needs]
    with pytest.raises(
        NeedsDecoderError, match=r"needs mechjax's own decoder .*, and got a Linen: "
    ) as raised:
        fn(**given | {"model": by_hand.subject()})
    assert (
        f"`{fn.__name__}`" in str(raised.value)
        and need.why in str(raised.value)
        and need.instead in str(raised.value)
    )


def test_table__of_all_public_functions__says_something_of_each():
    assert not set(table.functions()) - table.covered()
    assert table.covered() <= set(table.functions())


def test_function__given_the_name_of_a_model__says_how_to_load_it():
    with pytest.raises(
        NeedsDecoderError, match=r"`build` takes a model, and got the text 'gpt2': .* mj.load\('gpt2'\)"
    ):
        mj.graph.build("gpt2")


def test_readme__of_subjects__is_what_the_table_says():
    found = table.BETWEEN.search(table.README.read_text())
    assert found is not None and table.table() in found[0]
