"""What holds for every task: alignment, answers, named positions, seeds, and what is held out."""

import inspect
import sys

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechjax import tasks
from mechjax.base.errors import ArgumentError, PairingError, TokenError
from mechjax.tasks.pairs import make_pairs
from mechjax.tasks.split import split_of
from mechjax.tasks.template import Example
from mechjax.tasks.words import FEMALE_NAMES, SUBJECTS, VERBS

TASKS = (tasks.ioi, tasks.greater_than, tasks.pronouns, tasks.agreement, tasks.induction)
NAMED = {
    "ioi": ("IO", "S1", "S2", "END"),
    "greater_than": ("EVENT", "CENTURY", "YEAR", "END"),
    "pronouns": ("NAME", "PROFESSION", "END"),
    "agreement": ("SUBJECT", "ATTRACTOR", "END"),
    "induction": ("CUE", "COPIED", "END"),
}  # fmt: skip
N = 40
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.__name__)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    return {task.__name__: task(tokenizer, N, seed=3) for task in TASKS}


def at(pairs, prompts, name):
    return np.asarray(prompts.tokens)[np.arange(N), pairs.positions[name]]


@each_task
def test_pairs__clean_and_corrupt__differ_in_one_token(task, pairs):
    p = pairs[task.__name__]
    np.testing.assert_array_equal(p.clean.mask, p.corrupt.mask)
    assert ((p.clean.tokens != p.corrupt.tokens).sum(-1) == 1).all()
    assert (p.correct != p.wrong).all()


@each_task
def test_pairs__text__is_what_was_tokenized(task, pairs, tokenizer):
    p = pairs[task.__name__]
    assert eqx.tree_equal(tokenizer(list(p.clean_text)), p.clean)
    assert eqx.tree_equal(tokenizer(list(p.corrupt_text)), p.corrupt)


@each_task
def test_pairs__positions__are_named_and_end_is_the_last_real_token(task, pairs):
    p = pairs[task.__name__]
    assert set(p.positions) == set(NAMED[task.__name__])
    np.testing.assert_array_equal(p.positions["END"], p.clean.lengths - 1)
    assert all((p.positions[name] > 0).all() for name in p.positions)


@each_task
def test_pairs__seed__decides_everything(task, tokenizer, pairs):
    assert task(tokenizer, N, seed=3).clean_text == pairs[task.__name__].clean_text
    assert task(tokenizer, N, seed=4).clean_text != pairs[task.__name__].clean_text


@each_task
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), split=st.sampled_from(["train", "test"]))
def test_example__split__is_where_the_hash_puts_its_combination(task, seed, split):
    module = sys.modules[task.__module__]
    combinations = []
    original = module.draw

    def spy(propose, key, asked):
        drawn = original(propose, key, asked)
        combinations.append((key(drawn), asked))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw", spy)
        module.example(np.random.default_rng(seed), split)
    assert all(key[0] == task.__name__ and split_of(*key) == asked for key, asked in combinations)
    assert split in {asked for _, asked in combinations}


def test_split__of_many_combinations__holds_out_a_fifth():
    share = np.mean([split_of("ioi", str(i), str(j)) == "test" for i in range(100) for j in range(100)])
    assert 0.19 < share < 0.21


def test_split__of_one_combination__never_changes():
    # What the shipped model was trained on depends on it.
    splits = [split_of("ioi", "template", name) for name in "fghij"]
    assert splits == ["train", "train", "train", "test", "train"]


def test_ioi__named_positions__hold_the_names_and_the_answer_flips(pairs):
    p = pairs["ioi"]
    np.testing.assert_array_equal(at(p, p.clean, "IO"), p.correct)
    np.testing.assert_array_equal(at(p, p.clean, "S1"), p.wrong)
    np.testing.assert_array_equal(at(p, p.clean, "S2"), p.wrong)
    np.testing.assert_array_equal(at(p, p.corrupt, "S2"), p.correct)
    io_first = np.asarray(p.positions["IO"] < p.positions["S1"])
    assert 0.2 < io_first.mean() < 0.8


def test_greater_than__answers__are_the_years_above(pairs, tokenizer):
    p = pairs["greater_than"]
    years = np.array([tokenizer.token(f" {year:02d}") for year in range(100)])
    start = np.array([int(tokenizer.decode([token])) for token in at(p, p.clean, "YEAR")])
    np.testing.assert_array_equal(np.asarray(p.answers)[:, years], np.arange(100) > start[:, None])
    np.testing.assert_array_equal(np.asarray(p.answers).sum(-1), 99 - start)
    correct, wrong = (
        np.array([int(tokenizer.decode([int(t)])) for t in ids]) for ids in (p.correct, p.wrong)
    )
    assert ((wrong > 0) & (wrong <= start) & (start < correct)).all()
    assert set(tokenizer.decode([t]) for t in at(p, p.corrupt, "YEAR")) == {"00"}
    np.testing.assert_array_equal(at(p, p.clean, "END"), at(p, p.clean, "CENTURY"))


def test_pronouns__answer__follows_the_name_not_the_profession(pairs, tokenizer):
    p = pairs["pronouns"]
    she = tokenizer.token(" she")
    female = [tokenizer.decode([t]) in FEMALE_NAMES for t in at(p, p.clean, "NAME")]
    np.testing.assert_array_equal(p.correct == she, female)
    female = [tokenizer.decode([t]) in FEMALE_NAMES for t in at(p, p.corrupt, "NAME")]
    np.testing.assert_array_equal(p.wrong == she, female)


def test_agreement__answer__follows_the_subject_and_attractors_disagree_in_half(pairs, tokenizer):
    p = pairs["agreement"]
    word = lambda ids: [tokenizer.decode([int(t)]) for t in ids]
    singular = np.array([w in SUBJECTS for w in word(at(p, p.clean, "SUBJECT"))])
    attractor = np.array([w in SUBJECTS for w in word(at(p, p.clean, "ATTRACTOR"))])
    np.testing.assert_array_equal([w not in VERBS for w in word(p.correct)], singular)
    np.testing.assert_array_equal([w in VERBS for w in word(p.wrong)], singular)
    assert 0.2 < (singular != attractor).mean() < 0.8


def test_induction__answer__followed_the_last_word_before(pairs):
    p = pairs["induction"]
    np.testing.assert_array_equal(at(p, p.clean, "CUE"), at(p, p.clean, "END"))
    np.testing.assert_array_equal(at(p, p.clean, "COPIED"), p.correct)
    np.testing.assert_array_equal(at(p, p.corrupt, "COPIED"), p.wrong)
    np.testing.assert_array_equal(p.positions["COPIED"], p.positions["CUE"] + 1)
    assert (p.answers.sum(-1) == 1).all()


def test_right__of_certain_logits__is_the_rule_of_the_task(pairs, tokenizer):
    for p in pairs.values():
        rows = jnp.arange(N)
        flat = jnp.zeros((*p.clean.tokens.shape, tokenizer.vocab_size))
        end = (rows, p.positions["END"])
        assert p.right(flat.at[(*end, p.correct)].set(20.0)).all()
        assert not p.right(flat.at[(*end, p.wrong)].set(20.0)).any()
    # A right token that leads, but with less than half of the mass, is not enough where the whole vocabulary counts.
    leads = flat.at[(*end, p.correct)].set(1.0)
    assert not p.right(leads).any()


def test_task__no_pairs_or_an_unknown_split__is_refused(tokenizer):
    with pytest.raises(ArgumentError, match="n=0 pairs asked for"):
        tasks.ioi(tokenizer, 0)
    with pytest.raises(ArgumentError, match="the splits are 'train' and 'test'"):
        tasks.ioi(tokenizer, 1, split="valid")


def make(tokenizer, **texts):
    drawn = Example(
        **({"clean": "we liked it", "corrupt": "he liked it", "correct": "he", "wrong": "she"} | texts),
        ends={},
    )
    return make_pairs(tokenizer, lambda rng, split: drawn, 2, seed=0, split="test")


def test_make_pairs__token_counts_that_differ__are_shown_side_by_side(tokenizer):
    with pytest.raises(
        PairingError, match=r"2 of 2 pairs do not line up; the first has 4 clean and 5 corrupt tokens"
    ):
        make(tokenizer, corrupt="he liked it again")


def test_make_pairs__an_answer_of_two_tokens__is_refused(tokenizer):
    with pytest.raises(TokenError, match="he liked"):
        make(tokenizer, correct="he liked")


def test_tasks__signatures__are_the_same():
    assert len({str(inspect.signature(task)) for task in TASKS}) == 1
