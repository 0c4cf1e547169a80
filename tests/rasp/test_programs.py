"""Every standard program, compiled, on every input up to length 6; the interpreter against Python by hand."""

from functools import cache
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.base.errors import ArgumentError
from mechjax.rasp import (
    STANDARD,
    Select,
    SelectorWidth,
    compile_program,
    equal,
    indices,
    interpret,
    tokens,
)
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


@some("reverse")
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pair_balance", "reverse"])
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


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("pair_balance", "layer"),
        pytest.param("pair_balance", "rms", marks=pytest.mark.slow),
        pytest.param("double_hist", "layer", marks=pytest.mark.slow),
        pytest.param("dyck", "rms", marks=pytest.mark.slow),
    ],
)
def test_norms__held_still__change_no_value_and_no_circuit(name, norm):
    plain, normed = compiled(name), compiled(name, norm=norm, rotation=jax.random.key(0))
    assert (normed.model.config.norms, normed.model.config.norm) == ("pre", norm)
    assert_same(normed(words(name)), interpreted(name))
    assert_allclose(normed.basis @ normed.basis.T, jnp.eye(len(normed.basis)), **CLOSE)
    np.testing.assert_array_equal(normed.circuit, plain.circuit)


def test_selectors__joined_and_inverted__select_what_logic_says():
    same, before = Select(tokens, tokens, equal), Select(indices, indices, lambda key, query: key < query)
    joined = {
        "and": (same & before, lambda w, k, q: w[k] == w[q] and k < q),
        "or": (same | before, lambda w, k, q: w[k] == w[q] or k < q),
        "not": (~same, lambda w, k, q: w[k] != w[q]),
        "one sequence": (same & ~same, lambda w, k, q: False),
        "other queries": (
            Select(tokens, indices, lambda key, query: query > 0) & same,
            lambda w, k, q: q > 0 and w[k] == w[q],
        ),
    }
    every = [w for n in range(1, 4) for w in product("ab", repeat=n)]
    for selector, holds in joined.values():
        for w in every:
            right = [sum(holds(w, k, q) for k in range(len(w))) for q in range(len(w))]
            assert interpret(SelectorWidth(selector), w) == right
    assert joined["one sequence"][0].keys is tokens
    assert joined["and"][0].keys is joined["and"][0].queries
    program = SelectorWidth(same & before)
    assert compile_program(program, "ab", 3)(every) == [interpret(program, w) for w in every]


def test_truth__of_pairs__reads_what_differs_between_them():
    shift = compiled("shift")
    clean, corrupt = [tuple("abca"), tuple("aabb")], [tuple("acba"), tuple("bcac")]
    truth = shift.truth(clean, corrupt)
    assert_allclose(truth.metric(truth.model(truth.clean)), [1, 1], **CLOSE)
    assert_allclose(truth.metric(truth.model(truth.corrupt)), [-1, -1], **CLOSE)
    assert truth.graph == shift.graph
    with pytest.raises(ArgumentError, match=r"pair 0, .* gives the same at position 1 for both"):
        shift.truth(clean, corrupt, 1)
    with pytest.raises(
        ArgumentError, match=r"2 clean and 1 corrupt inputs, of lengths \[3, 4\]: give as many"
    ):
        shift.truth(clean, [tuple("abc")])


def test_sample__of_pairs__differ_in_what_the_program_gives():
    shift = compiled("shift")
    truth = shift.sample(5, seed=0)
    assert truth.clean.shape == (5, LONGEST)
    assert (truth.clean[:, -3] != truth.corrupt[:, -3]).all()
    assert_allclose(truth.metric(truth.model(truth.clean)), np.ones(5), **CLOSE)
    assert [truth.graph.nodes[i] for i in np.flatnonzero(truth.nodes)] == ["input", "a0.h0"]
    with pytest.raises(ArgumentError, match=r"of 500 random pairs .* only 0 differ at position 0"):
        shift.sample(5, seed=0, pos=0)


def test_sample__of_numbers_and_of_any_position__has_the_larger_on_the_clean_side():
    share = compiled("frac_prevs").sample(8, seed=1, pos=None)
    clean, corrupt = (share.metric(share.model(side)) for side in (share.clean, share.corrupt))
    assert (clean - corrupt > 1 / 100).all()  # shares of at most 6 tokens
    anywhere = compiled("shift").sample(5, seed=0, pos=None)
    assert int(anywhere.metric.pos) > 0  # where nothing is moved from, no pair differs


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
    with pytest.raises(ArgumentError, match=r"too warm .* Give at least (\d+\.\d)") as error:
        compiled(name, coldness=1.0)
    least = float(str(error.value).rpartition("at least ")[2].rstrip("."))
    assert 4 < least < 15
    assert compiled(name, coldness=least + 0.1)(words(name)) == interpreted(name)
