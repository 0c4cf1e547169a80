"""Induction: a sequence of random words, repeated; what followed a word before follows it again (Olsson et al. 2022).

The corrupt prompt has another word in the first copy where the answer is read, so `correct` and `wrong` change
places. Right: more probability on that one word than on the whole rest of the vocabulary. Reference: 2209.11895.
"""

import numpy as np

from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.pairs import Pairs, make_pairs
from mechjax.tasks.split import draw
from mechjax.tasks.template import Example, pick
from mechjax.tasks.words import ADJECTIVES, NAMES, OBJECTS, PLACES

WORDS = NAMES + PLACES + OBJECTS + ADJECTIVES
SHORTEST, LONGEST = 5, 10


def _next(rng: np.random.Generator, words: list[str], split: str, *, without: list[str]) -> str:
    """A word whose pair with the last of `words` belongs to `split`, and which is not one of `without`."""
    while True:
        word = draw(lambda: pick(rng, WORDS), lambda w: ("induction", words[-1], w), split)
        if word not in without:
            return word


def example(rng: np.random.Generator, split: str) -> Example:
    """Distinct words, then the same again up to before some word; held out by the pair of neighbours asked for.

    All other neighbours in a sequence are training pairs, so training never sees a held-out pair in a sequence.
    """
    period = int(rng.integers(SHORTEST, LONGEST + 1))
    asked = int(rng.integers(1, period))  # the answer is the word at this index
    words = [pick(rng, WORDS)]
    for i in range(1, period):
        words.append(_next(rng, words, split if i == asked else "train", without=words))
    wrong = _next(rng, words[:asked], split, without=words)
    again = " ".join(words[:asked])
    clean, corrupt = (
        " ".join([*words[:asked], word, *words[asked + 1 :], again]) for word in (words[asked], wrong)
    )
    ends = {"CUE": len(again), "COPIED": len(again) + 1 + len(words[asked])}
    rest = "".join(f" {word}" for word in words[asked + 1 :]) + "."
    return Example(
        clean, corrupt, words[asked], wrong, ends, rest, (words[asked],), known_before=asked - 1,
        known_after=period - asked - 1,
    )  # fmt: skip


def induction(tokenizer: Tokenizer, n: int, *, seed: int = 0, split: str = "test") -> Pairs:
    """`n` repeated sequences; positions CUE (the last word's first copy), COPIED (the word after it), END."""
    return make_pairs(tokenizer, example, n, seed=seed, split=split)
