"""Every standard program, compiled, on every input up to length 6; the interpreter against Python by hand."""

from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

import mechjax as mj
from mechjax.rasp import STANDARD, compile_program, interpret
from mechjax.rasp.schedule import schedule
from mechjax.rasp.values import Values
from tests.rasp.by_hand import BY_HAND
from tests.tolerances import TOL

LONGEST = 6
CLOSE = TOL["float32", "parity"]


def some(*quick):
    """These programs by default, the others among the slow tests."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in STANDARD]
    return pytest.mark.parametrize("name", names)


@cache
def words(name, longest=LONGEST):
    return [w for n in range(1, longest + 1) for w in product(STANDARD[name].vocabulary, repeat=n)]


@cache
def program(name):
    return STANDARD[name].make()


@cache
def interpreted(name, longest=LONGEST):
    return [interpret(program(name), w, causal=STANDARD[name].causal) for w in words(name, longest)]


def compiled(name, **choices):
    standard = STANDARD[name]
    return compile_program(program(name), standard.vocabulary, LONGEST, causal=standard.causal, **choices)


def assert_same(found, right):
    """Categories are equal; numbers are close."""
    if isinstance(right[0][0], float):
        assert [len(row) for row in found] == [len(row) for row in right]
        assert_allclose(np.concatenate(found), np.concatenate(right), **CLOSE)
    else:
        assert found == right


@pytest.mark.parametrize("longest", [3, pytest.param(LONGEST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", STANDARD)
def test_interpreter__every_input__is_what_python_says_by_hand(name, longest):
    assert_same(interpreted(name, longest), [list(BY_HAND[name](w)) for w in words(name, longest)])


@some("reverse", "pair_balance")
def test_compiled__every_input__is_the_interpreter(name):
    found = compiled(name)
    prompts = found.encode(words(name))
    logits, output = found.model(prompts), found.variables[-1]
    assert_same(found.decode(logits, prompts), interpreted(name))
    # Logits are the coordinates themselves, not only nearest to them.
    right = np.concatenate([[output.encode(v) for v in row] for row in interpreted(name)])
    assert_allclose(logits[prompts.mask][:, : output.size], right, **CLOSE)


def test_standard__programs__are_many_and_some_are_deep():
    assert len(STANDARD) == len(BY_HAND) >= 12
    plans = {
        name: schedule(program(name), Values(s.vocabulary, LONGEST), causal=s.causal)
        for name, s in STANDARD.items()
    }
    deep = [name for name, plan in plans.items() if plan.n_layers > 1]
    assert {"reverse", "sort", "double_hist", "most_frequent", "dyck"} <= set(deep)


@pytest.mark.parametrize("name", ["pair_balance", pytest.param("reverse", marks=pytest.mark.slow)])
def test_rotation__of_the_stream__changes_the_basis_alone(name):
    plain, turned = compiled(name), compiled(name, rotation=jax.random.key(0))
    assert (turned.edges, turned.variables, turned.model.config) == (
        plain.edges,
        plain.variables,
        plain.model.config,
    )
    assert_allclose(turned.basis @ turned.basis.T, jnp.eye(len(turned.basis)), **CLOSE)
    prompts = plain.encode(words(name))
    assert_allclose(turned.model(prompts), plain.model(prompts), **CLOSE)
    assert_allclose(
        turned.model.embed(prompts.tokens), plain.model.embed(prompts.tokens) @ turned.basis, **CLOSE
    )
    off_axis = np.abs(np.asarray(turned.model.W_E)).max(-1)
    assert off_axis.max() < 0.99, "no direction is left on an axis"


def test_causal__flag__is_the_interpreters():
    hist, word = program("hist"), [tuple("abab")]
    assert interpret(hist, word[0]) == [2, 2, 2, 2]
    assert interpret(hist, word[0], causal=True) == [1, 1, 2, 2]
    model = compile_program(hist, ("a", "b"), 4, causal=True)
    assert model.model.config.causal
    assert model(word) == [[1, 1, 2, 2]]


@pytest.mark.parametrize(
    "name", ["hist", *(pytest.param(n, marks=pytest.mark.slow) for n in ("reverse", "shift"))]
)
def test_coldness__just_cold_enough__keeps_every_value(name):
    with pytest.raises(mj.base.errors.ArgumentError, match=r"too warm .* Give at least (\d+\.\d)") as error:
        compiled(name, coldness=1.0)
    least = float(str(error.value).rpartition("at least ")[2].rstrip("."))
    assert 4 < least < 15
    assert compiled(name, coldness=least + 0.1)(words(name)) == interpreted(name)
