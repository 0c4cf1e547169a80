"""The vocabulary is as large as promised, and every text that a task can write is made of it."""

import numpy as np
import pytest
import tokenizers

from mechjax.base.errors import TokenError
from mechjax.tasks import words
from mechjax.tasks.free import sentence
from mechjax.tasks.greater_than import YEARS
from mechjax.tasks.ioi import TEMPLATES
from mechjax.tasks.vocabulary import SPECIAL, vocabulary


def test_counts__of_words_and_templates__are_as_promised():
    assert len(set(vocabulary())) == len(vocabulary()) >= 1000
    assert len(set(words.NAMES)) == len(words.NAMES) >= 100
    assert len(set(words.FEMALE_NAMES)) == len(set(words.MALE_NAMES))
    assert len(set(TEMPLATES)) == len(TEMPLATES) == 20
    assert len(set(words.PLACES)) == len(set(words.OBJECTS)) == 40
    assert len(set(words.PROFESSIONS)) == 20
    assert len(set(words.VERBS)) == 60
    assert len(YEARS) == 100


def test_words__after_an_indefinite_article__begin_with_a_consonant():
    assert not [word for word in (*words.OBJECTS, *words.PROFESSIONS) if word[0] in "aeiou"]


def test_tokenizer__text__is_split_into_words_marks_and_pairs_of_digits(tokenizer):
    pieces = tokenizer.str_tokens("When Mary left, the war of 1732 began.")
    assert pieces == ["<bos>", "When", "Mary", "left", ",", "the", "war", "of", "17", "32", "began", "."]
    assert tokenizer.token(" Mary") == tokenizer.token("Mary")


def test_tokenizer__special_tokens__come_first(tokenizer):
    assert [tokenizer.backend.token_to_id(token) for token in SPECIAL.values()] == [0, 1, 2]
    assert tokenizer.vocab_size == len(vocabulary())


def test_tokenizer__every_word__is_one_token_through_a_file(tokenizer, tmp_path):
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for i, word in enumerate(vocabulary()):
        assert again.encode(word, add_special_tokens=False).ids == [i]


def test_tokenizer__a_word_outside__is_refused(tokenizer):
    with pytest.raises(TokenError, match="`elephants`"):
        tokenizer("The elephants sing.")


def test_free__sentences__are_short_and_in_the_vocabulary(tokenizer):
    rng = np.random.default_rng(0)
    lengths = tokenizer([sentence(rng) for _ in range(200)]).lengths - 1
    assert 4 < lengths.min() <= lengths.max() <= 8
