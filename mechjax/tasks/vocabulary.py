"""The word-level vocabulary that all tasks share, and its tokenizer.

Text is split at spaces and punctuation, and digits into pairs: "the year 1732" is four tokens. A prompt starts with
`<bos>`; a word outside the vocabulary is refused.
"""

import tokenizers
from tokenizers import Regex, models, pre_tokenizers, processors

from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.agreement import CONTINUATIONS as AFTER_VERBS
from mechjax.tasks.agreement import TEMPLATES as AGREEMENT
from mechjax.tasks.free import TEMPLATES as FREE
from mechjax.tasks.greater_than import TEMPLATES as GREATER_THAN
from mechjax.tasks.greater_than import YEARS
from mechjax.tasks.ioi import TEMPLATES as IOI
from mechjax.tasks.pronouns import CONTINUATIONS as AFTER_PRONOUNS
from mechjax.tasks.pronouns import TEMPLATES as PRONOUNS
from mechjax.tasks.template import WORD, words_of
from mechjax.tasks.words import (
    ADJECTIVES,
    ADVERBS,
    EVENTS,
    NAMES,
    OBJECTS,
    PLACES,
    PROFESSIONS,
    SUBJECTS,
    THINGS,
    VERBS,
    plural,
    third_person,
)

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "unk_token": "<unk>"}


def vocabulary() -> tuple[str, ...]:
    """Every token, in the order of its id: special ones, words of the templates, years, words that fill the slots."""
    templates = IOI + GREATER_THAN + PRONOUNS + AGREEMENT + FREE + AFTER_VERBS + AFTER_PRONOUNS
    nouns, verbs = SUBJECTS + tuple(map(plural, SUBJECTS)), VERBS + tuple(map(third_person, VERBS))
    slots = NAMES + PLACES + OBJECTS + EVENTS + PROFESSIONS + nouns + verbs + ADJECTIVES + ADVERBS + THINGS
    words = (*SPECIAL.values(), "he", "she", *sorted(words_of(templates)), *YEARS, *slots)
    return tuple(dict.fromkeys(words))


def build_tokenizer() -> Tokenizer:
    """The tokenizer of `vocabulary`, as the zoo's models ship it."""
    ids = {word: i for i, word in enumerate(vocabulary())}
    backend = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=SPECIAL["unk_token"]))
    spaces = pre_tokenizers.WhitespaceSplit()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [spaces, pre_tokenizers.Split(Regex(WORD), behavior="isolated")]
    )
    bos = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, ids[bos])]
    )
    backend.add_special_tokens(list(SPECIAL.values()))
    return Tokenizer(backend, special=SPECIAL)
