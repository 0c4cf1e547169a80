"""Next words as tokens."""

import pytest

from mechjax.base.errors import TokenError
from mechjax.tasks.answer import answer_token
from mechjax.tasks.vocabulary import build_tokenizer


def test_answer_token__with_and_without_a_space__is_the_same_word():
    tokenizer = build_tokenizer()
    expected = tokenizer.token(" Mary")
    assert answer_token(tokenizer, "gave a ring to", "Mary") == expected
    assert answer_token(tokenizer, "gave a ring to", " Mary") == expected
    with pytest.raises(TokenError, match="is 2 tokens, not one"):
        answer_token(tokenizer, "gave a ring to", "Mary John")
