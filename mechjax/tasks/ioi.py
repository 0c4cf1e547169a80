"""Indirect object identification: who receives, when one of two named people gives (Wang et al. 2022, 2211.00593).

The clean prompt names two people and then one of them again, the giver S: the answer is the other, IO. The corrupt
prompt differs in one token: the second mention S2 is IO's name instead, so the answer flips to S and `correct` and
`wrong` change places. (Wang et al. replace all three names; that moves more than the fact of who is repeated.)
"""

import numpy as np

from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.free import lead
from mechjax.tasks.pairs import Pairs, make_pairs
from mechjax.tasks.split import draw
from mechjax.tasks.template import Example, fill, pick, pick_two
from mechjax.tasks.words import NAMES, OBJECTS, PLACES

TEMPLATES = (
    "When {A} and {B} went to the {PLACE}, {S2} gave a {OBJECT} to",
    "After {A} and {B} left the {PLACE}, {S2} went home and handed a {OBJECT} to",
    "While {A} and {B} were at the {PLACE}, {S2} found a {OBJECT} and passed it to",
    "Then {A} and {B} walked to the {PLACE} and {S2} offered a {OBJECT} to",
    "Because {A} and {B} met near the {PLACE}, {S2} sold a {OBJECT} to",
    "{A} and {B} had lunch at the {PLACE}. Later {S2} took a {OBJECT} home and sent it to",
    "Yesterday {A} met {B} inside the {PLACE}, so {S2} showed a {OBJECT} to",
    "The friends {A} and {B} found a {OBJECT}. Soon {S2} left the {PLACE} and gave it to",
    "Since {A} was waiting for {B}, {S2} went to the {PLACE} and brought a {OBJECT} to",
    "At the {PLACE}, {A} sat beside {B} until {S2} threw a {OBJECT} to",
    "Before {A} and {B} drove home, {S2} looked around the {PLACE} and lent a {OBJECT} to",
    "{A} was with {B} in the {PLACE} when {S2} returned a {OBJECT} to",
    "Once {A} had seen {B}, {S2} decided to leave the {PLACE} and give a {OBJECT} to",
    "Last week {A} worked with {B} behind the {PLACE}, and {S2} described a {OBJECT} to",
    "As {A} and {B} talked outside the {PLACE}, {S2} promised a {OBJECT} to",
    "There was a {OBJECT} for {A} and {B}, but {S2} took it from the {PLACE} and gave it to",
    "{A} argued with {B} in front of the {PLACE}, and afterwards {S2} mailed a {OBJECT} to",
    "Today {A} and {B} bought a {OBJECT}, then {S2} carried it through the {PLACE} to",
    "If {A} and {B} come to the {PLACE}, {S2} will lend a {OBJECT} to",
    "Although {A} and {B} were tired, {S2} came back from the {PLACE} with a {OBJECT} and showed it to",
)


def example(rng: np.random.Generator, split: str) -> Example:
    """One prompt, after up to two free sentences; held out by its template and unordered pair of names."""
    template, names = draw(
        lambda: (pick(rng, TEMPLATES), pick_two(rng, NAMES)),
        lambda drawn: ("ioi", drawn[0], *sorted(drawn[1])),
        split,
    )
    subject_first = bool(rng.integers(2))  # BABA; else ABBA
    subject, other = names if subject_first else names[::-1]
    words = {"A": names[0], "B": names[1], "PLACE": pick(rng, PLACES), "OBJECT": pick(rng, OBJECTS)}
    before = lead(rng)
    clean, ends = fill(template, words | {"S2": subject}, before)
    corrupt, _ = fill(template, words | {"S2": other}, before)
    roles = ("S1", "IO") if subject_first else ("IO", "S1")
    ends = {roles[0]: ends["A"], roles[1]: ends["B"], "S2": ends["S2"]}
    return Example(clean, corrupt, other, subject, {name: ends[name] for name in ("IO", "S1", "S2")})


def ioi(tokenizer: Tokenizer, n: int, *, seed: int = 0, split: str = "test") -> Pairs:
    """`n` indirect object prompts, both orders (ABBA and BABA) equally often; positions IO, S1, S2, END."""
    return make_pairs(tokenizer, example, n, seed=seed, split=split)
