"""What cannot be written, run or compiled: which expression, and why."""

import pytest

from mechjax.base.errors import ArgumentError, TokenError
from mechjax.rasp import (
    Aggregate,
    LinearSequenceMap,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    always,
    compile_program,
    equal,
    indices,
    interpret,
    tokens,
)
from mechjax.rasp.expressions import Indices
from mechjax.rasp.programs import frac_prevs

AB = ("a", "b")
everywhere = Select(tokens, tokens, always)
one = Map(lambda t: 1, tokens, encoding="numerical", name="one")
share = frac_prevs("a")

REFUSED = {
    "selector reads numbers": (
        SelectorWidth(Select(share, tokens, equal, name="look")),
        r"`look` \(Select\) cannot be compiled: it compares one-hot keys and queries, and `frac_a` is numerical\. Make",
    ),
    "pairs of numbers": (
        SequenceMap(lambda a, b: a, tokens, share, name="both"),
        r"`both` \(SequenceMap\) cannot be compiled: it looks up pairs of categories, and `frac_a` is numerical",
    ),
    "sum of categories": (
        LinearSequenceMap(share, tokens, 1.0, 1.0, name="sum"),
        r"`sum` \(LinearSequenceMap\) cannot be compiled: it adds numbers, and `tokens` is categorical\. Make it",
    ),
    "sum as a category": (
        LinearSequenceMap(one, one, 1.0, 1.0, name="sum", encoding="categorical"),
        r"`sum` \(LinearSequenceMap\) cannot be compiled: it is always numerical, not categorical",
    ),
    "indices as numbers": (
        Indices(name="places", encoding="numerical"),
        r"`places` \(Indices\) cannot be compiled: it is always categorical, not numerical\. Map it",
    ),
    "no number": (
        Map(lambda t: t, tokens, encoding="numerical", name="letters"),
        r"`letters` \(Map\) cannot be compiled: it is numerical, and could be 'a', which is no number",
    ),
    "never a value": (
        Map(lambda t: t / 0, tokens, name="broken"),
        r"`broken` \(Map\) cannot be compiled: its function raises for every value",
    ),
    "a value that is met raises": (
        Map(lambda t: {"a": 1}[t], tokens, name="half"),
        r"function of `half` \(Map\) raised KeyError on 'b'",
    ),
    "a predicate raises": (
        SelectorWidth(Select(tokens, tokens, lambda k, q: k < 1, name="less")),
        r"function of `less` \(Select\) raised TypeError on 'a', 'a'",
    ),
    "different categories": (
        Aggregate(everywhere, tokens, name="mixed"),
        r"`mixed` \(Aggregate\) selects different categories, 'a' and 'b', at position 0 of \['a', 'b'\]",
    ),
    "nothing selected": (
        Aggregate(Select(tokens, tokens, lambda k, q: k == "a"), tokens, name="an_a"),
        r"`an_a` \(Aggregate\) selects nothing at position 0 of \['b'\] and has no default",
    ),
    "unhashable": (
        Map(lambda t: [t], tokens, name="lists"),
        r"`lists` \(Map\) cannot be compiled: it could be \['a'\], which does not hash",
    ),
    "too close": (
        Map(lambda x: x > 1, Map(lambda t: 1.0 + (t == "b") * 1e-6, tokens, encoding="numerical"), name="fine"),
        r"`fine` cannot be compiled: it gives different values for 1 and 1, which are too close",
    ),
    "a selector": (
        Select(tokens, indices, equal, name="where"),
        r"A program is a sequence \(SOp\), got the selector `where`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_compile_program__what_cannot_be__is_refused_by_name(case, as_a_user):
    program, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        compile_program(program, AB, 3)


def test_compile_program__too_many_values__are_refused_before_they_are_listed():
    pairs = SequenceMap(lambda t, i: (t, i), tokens, indices, name="place")
    fours = SequenceMap(lambda a, b: (a, b), pairs, pairs, name="places")
    with pytest.raises(ArgumentError, match=r"`places` \(SequenceMap\) .* more than 4,096 values"):
        compile_program(fours, range(20), 10)
    average = Aggregate(everywhere, Map(lambda t: 2.0**-t, tokens, encoding="numerical"), name="average")
    with pytest.raises(ArgumentError, match=r"`average` \(Aggregate\) .* more than 4,096 values"):
        compile_program(Map(lambda x: x > 0.5, average), range(10), 12)


def test_compile_program__bad_arguments__are_refused(as_a_user):
    for vocabulary in ((), ("a", "a")):
        with pytest.raises(
            ArgumentError, match=r"`vocabulary` = .* at least one token, and each of them once"
        ):
            compile_program(tokens, vocabulary, 3)
    with pytest.raises(ArgumentError, match="`max_length` = 0 must be a whole number from 1"):
        compile_program(tokens, AB, 0)
    with pytest.raises(ArgumentError, match=r"`coldness` = 0.0 must be a positive"):
        compile_program(tokens, AB, 3, coldness=0.0)
    with pytest.raises(ArgumentError, match="`norm` = 'batch' is not one of 'none', 'rms', 'layer'"):
        compile_program(tokens, AB, 3, norm="batch")
    with pytest.raises(
        ArgumentError, match=r"combines with another selector by & and \|, got `tokens` \(Tokens"
    ):
        everywhere & tokens
    with pytest.raises(ArgumentError, match=r"`encoding` = 'numeric' of `Map\(tokens\)` is not one of"):
        Map(len, tokens, encoding="numeric")
    with pytest.raises(
        ArgumentError, match="`default` = None of `means` must be a number, as the mean of `one` is"
    ):
        Aggregate(everywhere, one, None, name="means")


def test_expressions__of_the_wrong_kind__say_what_they_take(as_a_user):
    with pytest.raises(ArgumentError, match="Aggregate takes a selector as `selector`, got `tokens`"):
        Aggregate(tokens, tokens)
    with pytest.raises(
        ArgumentError, match=r"Map takes a sequence as `of`, got `Select\(.*A selector becomes one"
    ):
        Map(len, everywhere)
    with pytest.raises(ArgumentError, match=r"A program is a sequence .*, got 'reverse'"):
        interpret("reverse", AB)


def test_mean__of_what_is_no_number__names_the_expression():
    letters = Map(lambda t: t, tokens, encoding="numerical", name="letters")
    with pytest.raises(ArgumentError, match=r"function of `mean` \(Aggregate\) raised TypeError"):
        interpret(Aggregate(everywhere, letters, name="mean"), AB)


def test_compiled__inputs_it_was_not_made_for__are_refused():
    model = compile_program(tokens, AB, 2)
    assert model([["a"], ["b", "a"]]) == [["a"], ["b", "a"]]
    for inputs, message in (
        ([["c"]], r"'c' is not in the vocabulary .*: \('a', 'b'\)"),
        ([["a"] * 3], "has 3 tokens; the program was compiled for 1 to 2"),
        ([[]], "has 0 tokens"),
        ([], "There is no input"),
    ):
        with pytest.raises(TokenError, match=message):
            model(inputs)
