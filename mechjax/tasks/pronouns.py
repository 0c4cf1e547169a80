"""Gendered pronouns: "he" or "she" for a named person, whatever the profession (after Vig et al. 2020, 2004.12265).

The corrupt prompt names a person of the other gender, so `correct` and `wrong` change places.
"""

import numpy as np

from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.pairs import Pairs, make_pairs
from mechjax.tasks.split import draw
from mechjax.tasks.template import Example, fill, pick
from mechjax.tasks.words import FEMALE_NAMES, MALE_NAMES, PROFESSIONS

TEMPLATES = (
    "{NAME} worked as a {PROFESSION} because",
    "The {PROFESSION} named {NAME} was happy when",
    "{NAME} became a {PROFESSION} after",
    "Everyone knew {NAME} as a good {PROFESSION}, and",
    "We asked {NAME} about the work of a {PROFESSION}, but",
    "Our {PROFESSION} is {NAME}, and we think that",
    "When {NAME} was young, being a {PROFESSION} was what",
    "{NAME} stopped working as a {PROFESSION} until",
)
CONTINUATIONS = (" liked it.", " moved to the city.", " needed a rest.", " wanted.", " learned more.")


def example(rng: np.random.Generator, split: str) -> Example:
    """One prompt; held out by template, name and profession."""
    female = bool(rng.integers(2))
    own, other = (FEMALE_NAMES, MALE_NAMES) if female else (MALE_NAMES, FEMALE_NAMES)
    template, name, profession = draw(
        lambda: (pick(rng, TEMPLATES), pick(rng, own), pick(rng, PROFESSIONS)),
        lambda drawn: ("pronouns", *drawn),
        split,
    )
    clean, ends = fill(template, {"NAME": name, "PROFESSION": profession})
    corrupt, _ = fill(template, {"NAME": pick(rng, other), "PROFESSION": profession})
    correct, wrong = ("she", "he") if female else ("he", "she")
    return Example(clean, corrupt, correct, wrong, ends, rest=pick(rng, CONTINUATIONS))


def pronouns(tokenizer: Tokenizer, n: int, *, seed: int = 0, split: str = "test") -> Pairs:
    """`n` prompts answered by "he" or "she"; positions NAME, PROFESSION, END."""
    return make_pairs(tokenizer, example, n, seed=seed, split=split)
