"""Subject-verb agreement across an attractor (Linzen et al. 2016, 1611.01368).

"The dogs near the tree" is continued by "run", not by "runs", though "tree" stands nearer. The corrupt prompt has the
subject in the other number, so `correct` and `wrong`, two forms of one verb, change places. The attractor's number is
drawn by itself: in half of the prompts it speaks for the wrong form.
"""

import numpy as np

from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.pairs import Pairs, make_pairs
from mechjax.tasks.split import draw
from mechjax.tasks.template import Example, fill, pick, pick_two
from mechjax.tasks.words import ADJECTIVES, SUBJECTS, VERBS, plural, third_person

TEMPLATES = (
    "The {SUBJECT} near the {ATTRACTOR}",
    "The {ADJECTIVE} {SUBJECT} behind the {ATTRACTOR} often",
    "The {SUBJECT} that the {ATTRACTOR} liked always",
    "Today the {SUBJECT} with the {ADJECTIVE} {ATTRACTOR} still",
    "We know that the {SUBJECT} from the {ATTRACTOR}",
    "The {SUBJECT} in front of the {ATTRACTOR} rarely",
    "Perhaps the {SUBJECT} of the {ADJECTIVE} {ATTRACTOR} never",
    "The {SUBJECT} that met the {ATTRACTOR} sometimes",
)
CONTINUATIONS = (".", " every day.", " at night.", " again.")


def example(rng: np.random.Generator, split: str) -> Example:
    """One prompt; held out by template, subject and attractor, whatever their numbers."""
    template, (subject, attractor) = draw(
        lambda: (pick(rng, TEMPLATES), pick_two(rng, SUBJECTS)),
        lambda drawn: ("agreement", drawn[0], *drawn[1]),
        split,
    )
    numbers, forms = (subject, plural(subject)), (third_person(verb := pick(rng, VERBS)), verb)
    many = int(rng.integers(2))
    words = {"ADJECTIVE": pick(rng, ADJECTIVES), "ATTRACTOR": (attractor, plural(attractor))[rng.integers(2)]}
    clean, ends = fill(template, words | {"SUBJECT": numbers[many]})
    corrupt, _ = fill(template, words | {"SUBJECT": numbers[1 - many]})
    ends = {name: ends[name] for name in ("SUBJECT", "ATTRACTOR")}
    return Example(clean, corrupt, forms[many], forms[1 - many], ends, rest=pick(rng, CONTINUATIONS))


def agreement(tokenizer: Tokenizer, n: int, *, seed: int = 0, split: str = "test") -> Pairs:
    """`n` prompts answered by one of two forms of a verb; positions SUBJECT, ATTRACTOR, END."""
    return make_pairs(tokenizer, example, n, seed=seed, split=split)
