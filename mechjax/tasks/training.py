"""Rows of text to train on: all tasks' training splits and free sentences, packed to a fixed length."""

from collections.abc import Iterator

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
from mechjax.tasks.template import Example

MIX = {ioi: 0.4, induction: 0.25, greater_than: 0.1, pronouns: 0.15, agreement: 0.1}
"""How often a row is about each task."""


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
    tokenizer: Tokenizer, n: int, *, length: int = 40, answer_weight: float = 10.0, seed: int = 0
) -> Iterator[Rows]:
    """Endless batches of `n` rows of `length` tokens.

    A row is about one task, drawn from `MIX`; free sentences, years and subjects with verbs stand before and after
    it while there is room, so that it begins anywhere. No row has more than one sentence with people in it.

    Args:
        tokenizer: The tokenizer; it must put a BOS in front.
        n: Rows in a batch.
        length: Tokens in a row, BOS included.
        answer_weight: Weight of the answers' tokens; all other words weigh 1.
        seed: The same seed gives the same batches.

    Raises:
        ArgumentError: `length` too short for the longest prompt.
    """
    rng = np.random.default_rng(seed)
    tasks, shares = tuple(MIX), tuple(MIX.values())
    while True:
        batch = Rows(*(np.zeros((n, length), kind) for kind in (np.int32, bool, np.float32)))
        for row, task in enumerate(rng.choice(len(tasks), n, p=shares)):
            pieces = [_encode(tokenizer, tasks[task](rng, "train"))]
            room = length - 1 - len(pieces[0][0])
            if room < 0:
                raise ArgumentError(
                    f"length={length} is too short for a prompt of {length - 1 - room} tokens. Pass length=40 or more."
                )
            while len((filler := _filler(rng, tokenizer))[0]) <= room:
                pieces.append(filler)
                room -= len(filler[0])
            _write(batch, row, tokenizer, [pieces[i] for i in rng.permutation(len(pieces))], answer_weight)
        yield batch


def _filler(rng: np.random.Generator, tokenizer: Tokenizer) -> tuple[list[int], slice]:
    """A sentence without people: a free one, one with years, or one with a subject and a verb."""
    kind = rng.integers(3)
    if kind == 0:
        return tokenizer.backend.encode(sentence(rng), add_special_tokens=False).ids, slice(0)
    return _encode(tokenizer, (greater_than, agreement)[kind - 1](rng, "train"))


def _encode(tokenizer: Tokenizer, drawn: Example) -> tuple[list[int], slice]:
    """Ids without BOS, and the place of the known words among them."""
    encode = tokenizer.backend.encode
    ids = encode(f"{drawn.clean} {drawn.correct}{drawn.rest}", add_special_tokens=False).ids
    start = len(encode(drawn.clean, add_special_tokens=False).ids)
    return ids, slice(start, start + drawn.known)


def _write(
    batch: Rows, row: int, tokenizer: Tokenizer, pieces: list[tuple[list[int], slice]], answer_weight: float
) -> None:
    """Put BOS and `pieces` into one row of the (NumPy) arrays of `batch`."""
    batch.tokens[row, 0], batch.mask[row, 0] = tokenizer.bos_id, True
    at = 1
    for ids, known in pieces:
        place = slice(at, at + len(ids))
        batch.tokens[row, place], batch.mask[row, place], batch.weight[row, place] = ids, True, 1.0
        batch.weight[row, place][known] = answer_weight
        at += len(ids)
