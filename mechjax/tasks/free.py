"""Free sentences: short, true to no task, without people; they stand before prompts and move them about."""

import numpy as np

from mechjax.tasks.template import fill, pick, slots_of
from mechjax.tasks.words import ADJECTIVES, ADVERBS, EVENTS, PLACES, THINGS

TEMPLATES = (
    "The {ADJECTIVE} {THING} was {ADVERB} {OTHER}.",
    "There was {THING} near the {PLACE}.",
    "It was a day with {THING}.",
    "Nobody saw the {ADJECTIVE} {THING}.",
    "The {THING} of the {PLACE} looked {ADJECTIVE}.",
    "The {EVENT} was {ADVERB} {ADJECTIVE}.",
    "Some {THING} is {ADJECTIVE} and {OTHER}.",
    "We liked the {PLACE} and the {THING}.",
    "The weather was {ADVERB} {ADJECTIVE}.",
    "This {THING} smelled {ADJECTIVE}.",
)


_POOLS = {
    "ADJECTIVE": ADJECTIVES,
    "OTHER": ADJECTIVES,
    "THING": THINGS,
    "PLACE": PLACES,
    "EVENT": EVENTS,
    "ADVERB": ADVERBS,
}


def sentence(rng: np.random.Generator) -> str:
    """One free sentence of at most eight words and marks."""
    template = pick(rng, TEMPLATES)
    return fill(template, {slot: pick(rng, _POOLS[slot]) for slot in slots_of(template)})[0]


def lead(rng: np.random.Generator, most: int = 2) -> str:
    """No, one or up to `most` free sentences, each followed by a space."""
    return "".join(sentence(rng) + " " for _ in range(rng.integers(most + 1)))
