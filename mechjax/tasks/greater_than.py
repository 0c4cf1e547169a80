"""Greater-than: an end year must come after the start year (Hanna et al. 2023, 2305.00586).

"The war lasted from the year 1732 to the year 17" is continued rightly by every two-digit year above 32. The corrupt
prompt starts in the year 00 of the same century, which allows every later year, so `wrong`, a year from 01 to the
start year, becomes right. (The paper's corrupt year is 01, since GPT-2's tokenizer has no year 1700.) Right: more
probability on the years above than on the whole rest of the vocabulary.
"""

import numpy as np

from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.pairs import Pairs, make_pairs
from mechjax.tasks.split import draw
from mechjax.tasks.template import Example, fill, pick
from mechjax.tasks.words import EVENTS

TEMPLATES = (
    "The {EVENT} lasted from the year {CENTURY}{YEAR} to the year {AGAIN}",
    "The {EVENT} began in {CENTURY}{YEAR} and ended in {AGAIN}",
    "After {CENTURY}{YEAR}, the {EVENT} went on until {AGAIN}",
    "From {CENTURY}{YEAR} the {EVENT} continued through {AGAIN}",
)
YEARS = tuple(f"{year:02d}" for year in range(100))
CENTURIES = tuple(f"{century:02d}" for century in range(10, 21))


def example(rng: np.random.Generator, split: str) -> Example:
    """One prompt with a start year from 01 to 98; held out by template, event and start year."""
    template, event, year = draw(
        lambda: (pick(rng, TEMPLATES), pick(rng, EVENTS), int(rng.integers(1, 99))),
        lambda drawn: ("greater_than", drawn[0], drawn[1], YEARS[drawn[2]]),
        split,
    )
    century = pick(rng, CENTURIES)
    words = {"EVENT": event, "CENTURY": century, "AGAIN": century}
    clean, ends = fill(template, words | {"YEAR": YEARS[year]})
    corrupt, _ = fill(template, words | {"YEAR": YEARS[0]})
    above, below = YEARS[year + 1 :], YEARS[1 : year + 1]
    ends = {name: ends[name] for name in ("EVENT", "CENTURY", "YEAR")}
    return Example(clean, corrupt, pick(rng, above), pick(rng, below), ends, answers=above)


def greater_than(tokenizer: Tokenizer, n: int, *, seed: int = 0, split: str = "test") -> Pairs:
    """`n` year prompts; `answers` marks every year above the start year; positions EVENT, CENTURY, YEAR, END."""
    return make_pairs(tokenizer, example, n, seed=seed, split=split)
