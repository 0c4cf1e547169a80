"""Templates with named slots, and the example that a task draws from them."""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

WORD = r"\d\d|\w+|[^\w\s]"
"""What one token is: a pair of digits, a word, a mark."""

_SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Example:
    """One drawn prompt in two versions, as text.

    Attributes:
        clean: The prompt whose right answer is `correct`.
        corrupt: The same prompt with one word changed, so that `wrong` would be right (or, for several answers, was).
        correct: The right next word of `clean`.
        wrong: A next word that `clean` rules out.
        ends: Name of a position -> where, in characters of `clean`, the word that it names ends.
        rest: What follows the answer when the example is trained on.
        answers: All right next words where `correct` is one of several or must beat the whole vocabulary.
        known_before: How many words right before the answer follow, as it does, from what stands before them.
        known_after: How many right after it do.
    """

    clean: str
    corrupt: str
    correct: str
    wrong: str
    ends: dict[str, int]
    rest: str = "."
    answers: tuple[str, ...] = ()
    known_before: int = 0
    known_after: int = 0


def pick(rng: np.random.Generator, pool: tuple[str, ...]) -> str:
    """One word of `pool`."""
    return pool[rng.integers(len(pool))]


def pick_two(rng: np.random.Generator, pool: tuple[str, ...]) -> tuple[str, str]:
    """Two different words of `pool`, in random order."""
    first, step = rng.integers(len(pool)), rng.integers(1, len(pool))
    return pool[first], pool[(first + step) % len(pool)]


def fill(template: str, words: dict[str, str], lead: str = "") -> tuple[str, dict[str, int]]:
    """`lead` and `template` with its `{SLOTS}` filled, and where each slot's word ends, in characters."""
    text, ends = lead, {}
    for i, piece in enumerate(_pieces(template)):
        text += words[piece] if i % 2 else piece
        if i % 2:
            ends[piece] = len(text)
    return text, ends


def slots_of(template: str) -> list[str]:
    """The names of a template's slots, in order."""
    return _pieces(template)[1::2]


@cache
def _pieces(template: str) -> list[str]:
    """Fixed text and slots' names, by turns."""
    return _SLOT.split(template)


def words_of(templates: tuple[str, ...]) -> list[str]:
    """The fixed words and punctuation of `templates`."""
    return [word for template in templates for word in re.findall(WORD, _SLOT.sub(" ", template))]
