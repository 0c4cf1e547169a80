import pytest

from mechjax.tasks.vocabulary import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer that all tasks share."""
    return build_tokenizer()
