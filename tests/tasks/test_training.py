"""Rows to train on: packed, weighted, repeatable, and free of what is held out."""

from itertools import combinations, islice

import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.tasks.ioi import TEMPLATES
from mechjax.tasks.split import split_of
from mechjax.tasks.template import words_of
from mechjax.tasks.training import rows
from mechjax.tasks.words import NAMES


@pytest.fixture(scope="module")
def batches(tokenizer):
    return list(islice(rows(tokenizer, 64, answer_weight=7.0, seed=5), 4))


def texts(tokenizer, batch):
    return [tokenizer.decode(row[mask]) for row, mask in zip(batch.tokens, batch.mask, strict=True)]


def test_rows__shape_mask_and_weight__agree(batches, tokenizer):
    for batch in batches:
        assert batch.tokens.shape == batch.mask.shape == batch.weight.shape == (64, 40)
        assert (batch.tokens[:, 0] == tokenizer.bos_id).all()
        assert (np.diff(batch.mask.astype(int), axis=1) <= 0).all()  # padding at the right
        np.testing.assert_array_equal(batch.weight > 0, batch.mask & (np.arange(40) > 0))
        assert set(np.unique(batch.weight)) == {0, 1, 7}
        assert (batch.weight == 7).any(-1).all()  # every row asks something
    assert np.mean([batch.mask.mean() for batch in batches]) > 0.8


def test_rows__ids__are_those_of_the_tokenizer(batches, tokenizer):
    for text, row, mask in zip(texts(tokenizer, batches[0]), batches[0].tokens, batches[0].mask, strict=True):
        np.testing.assert_array_equal(tokenizer(text.removeprefix("<bos> ")).tokens, row[mask])


def test_rows__seed__decides_everything(batches, tokenizer):
    again = next(rows(tokenizer, 64, answer_weight=7.0, seed=5))
    np.testing.assert_array_equal(again.tokens, batches[0].tokens)
    assert (next(rows(tokenizer, 64, seed=6)).tokens != batches[0].tokens).any()


def test_rows__names_of_a_held_out_combination__never_meet_in_its_template(batches, tokenizer):
    """Read from the text alone: which template it is, by its fixed words, and which two names are in it."""
    seen = 0
    for text in (text for batch in batches for text in texts(tokenizer, batch)):
        spaced = text.split()
        for template in TEMPLATES:
            fixed = words_of((template,))
            places = [i for i, word in enumerate(spaced) if word == fixed[0]] if fixed[0][0].isupper() else []
            if not any(set(fixed) <= set(spaced[i : i + 24]) for i in places):
                continue
            pairs = [sorted(pair) for pair in combinations(dict.fromkeys(w for w in spaced if w in NAMES), 2)]
            if len(pairs) == 1:
                seen += 1
                assert split_of("ioi", template, *pairs[0]) == "train", text
    assert seen > 20


def test_rows__induction__has_no_held_out_neighbours(batches, tokenizer):
    seen = 0
    for batch in batches:
        for text, weight in zip(texts(tokenizer, batch), batch.weight, strict=True):
            spaced, known = text.split(), weight == 7
            # Only a repeated sequence has neighbours that both follow from what came before.
            for i in np.flatnonzero(known[:-1] & known[1:]):
                seen += 1
                assert split_of("induction", spaced[i], spaced[i + 1]) == "train", text
    assert seen > 100


def test_rows__too_short__says_what_would_do(tokenizer):
    with pytest.raises(
        ArgumentError, match=r"length=12 is too short for a prompt of .* Pass length=40 or more"
    ):
        list(islice(rows(tokenizer, 64, length=12), 3))
