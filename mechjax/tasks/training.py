"""Rows of text to train on: all tasks' training splits and free sentences, packed to a fixed length."""

import re
from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.records import Record
from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.agreement import example as agreement
from mechjax.tasks.free import sentence
from mechjax.tasks.greater_than import example as greater_than
from mechjax.tasks.induction import example as induction
from mechjax.tasks.ioi import example as ioi
from mechjax.tasks.pronouns import example as pronouns
from mechjax.tasks.template import WORD, Example

MIX = {ioi: 0.3, induction: 0.25, pronouns: 0.25, greater_than: 0.1, agreement: 0.1}
"""How often a row is about each task."""

Encode = Callable[[str], list[int]]
Piece = tuple[list[int], list[bool]]
_WORD = re.compile(WORD)


class Rows(Record):
    """Packed training sequences.

    Attributes:
        tokens: Each row a BOS and whole sentences. Shape (batch, pos).
        mask: True at real tokens; padding stands at the right. Shape (batch, pos).
        weight: How much predicting each token counts in the loss: 0 at BOS and padding. Shape (batch, pos).
    """

    tokens: Int[Array | np.ndarray, "*batch pos"]
    mask: Bool[Array | np.ndarray, "*batch pos"]
    weight: Float[Array | np.ndarray, "*batch pos"]


def rows(
    tokenizer: Tokenizer, n: int, *, length: int = 40, answer_weight: float = 30.0, seed: int = 0
) -> Iterator[Rows]:
    """Endless batches of `n` rows of `length` tokens.

    A row is about one task, drawn from `MIX`; free sentences, years and subjects with verbs stand before and after
    it while there is room, so that it begins anywhere. No row has more than one sentence with people in it.

    Args:
        tokenizer: The tokenizer; it must put a BOS in front.
        n: Rows in a batch.
        length: Tokens in a row, BOS included.
        answer_weight: Weight of the words that follow from what stands before; all others weigh 1.
        seed: The same seed gives the same batches.

    Raises:
        ArgumentError: `length` too short for the longest prompt.
    """
    rng, vocabulary = np.random.default_rng(seed), tokenizer.backend.get_vocab()
    # What the tokenizer does with this vocabulary, ten times faster; the tests compare the two.
    encode = lambda text: [vocabulary[word] for word in _WORD.findall(text)]
    tasks, shares = tuple(MIX), tuple(MIX.values())
    while True:
        batch = Rows(*(np.zeros((n, length), kind) for kind in (np.int32, bool, np.float32)))
        batch.tokens[:, 0], batch.mask[:, 0] = tokenizer.bos_id, True
        for row, task in enumerate(rng.choice(len(tasks), n, p=shares)):
            pieces = [_encoded(encode, tasks[task](rng, "train"))]
            room = length - 1 - len(pieces[0][0])
            if room < 0:
                raise ArgumentError(
                    f"length={length} is too short for a prompt of {length - 1 - room} tokens. Pass length=40 or more."
                )
            while len((filler := _filler(encode, rng))[0]) <= room:
                pieces.append(filler)
                room -= len(filler[0])
            rng.shuffle(pieces)
            ids, known = (list(chain(*parts)) for parts in zip(*pieces, strict=True))
            place = slice(1, 1 + len(ids))
            batch.tokens[row, place], batch.mask[row, place] = ids, True
            batch.weight[row, place] = np.where(known, answer_weight, 1.0)
        yield batch


def _filler(encode: Encode, rng: np.random.Generator) -> Piece:
    """A sentence without people: a free one, one with years, or one with a subject and a verb."""
    kind = rng.integers(3)
    if kind == 0:
        ids = encode(sentence(rng))
        return ids, [False] * len(ids)
    return _encoded(encode, (greater_than, agreement)[kind - 1](rng, "train"))


def _encoded(encode: Encode, drawn: Example) -> Piece:
    """Ids without BOS, and which of them follow from what stands before."""
    before, after = encode(drawn.clean), encode(drawn.correct + drawn.rest)
    ids = before + after
    first, last = len(before) - drawn.known_before, len(before) + drawn.known_after
    return ids, [first <= i <= last for i in range(len(ids))]
