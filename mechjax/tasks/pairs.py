"""Clean and corrupt prompts that line up token by token, with their answers and named positions."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, PairingError
from mechjax.base.prompts import Prompts
from mechjax.base.records import Record
from mechjax.hub.tokenizer import Tokenizer
from mechjax.tasks.template import Example


class Pairs(Record):
    """A batch of prompts in two versions.

    Attributes:
        clean: Prompts whose right answer is `correct`.
        corrupt: The same prompts with one token changed, so that `wrong` would be right. Same token counts.
        correct: Id of the right next token of `clean`. Shape (batch,).
        wrong: Id of a next token that `clean` rules out. Shape (batch,).
        positions: Name -> index along `pos` of the token that it names, padding included. Each of shape (batch,).
        answers: True at every right next token, where `correct` is one of several or must beat the whole
            vocabulary; None where the question is `correct` against `wrong`. Shape (batch, d_vocab).
        clean_text: The clean prompts as text.
        corrupt_text: The corrupt prompts as text.
    """

    clean: Prompts
    corrupt: Prompts
    correct: Int[Array, "batch"]
    wrong: Int[Array, "batch"]
    positions: dict[str, Int[Array, "batch"]]
    answers: Bool[Array, "batch d_vocab"] | None
    clean_text: tuple[str, ...] = eqx.field(static=True)
    corrupt_text: tuple[str, ...] = eqx.field(static=True)

    def right(self, logits: Float[Array, "batch pos d_vocab"]) -> Bool[Array, "batch"]:
        """Whether `logits` of the clean prompts answer right: at END, more probability on the right than on the wrong.

        With `answers`, the mass on all of them against the mass on the rest of the vocabulary; else `correct`
        against `wrong`.
        """
        last = jnp.take_along_axis(logits, self.positions["END"][:, None, None], axis=1)[:, 0]
        if self.answers is not None:
            return jnp.where(self.answers, jax.nn.softmax(last), 0.0).sum(-1) > 0.5
        rows = jnp.arange(last.shape[0])
        return last[rows, self.correct] > last[rows, self.wrong]


def make_pairs(
    tokenizer: Tokenizer,
    example: Callable[[np.random.Generator, str], Example],
    n: int,
    *,
    seed: int,
    split: str,
) -> Pairs:
    """`n` draws of `example(rng, split)`, tokenized.

    Raises:
        ArgumentError: `n` below one, or a split that does not exist.
        TokenError: An answer that is not one token of `tokenizer`.
        PairingError: A pair whose two versions have different token counts.
    """
    if n < 1:
        raise ArgumentError(f"n={n} pairs asked for: a task gives one or more. Pass n >= 1.")
    rng = np.random.default_rng(seed)
    drawn = [example(rng, split) for _ in range(n)]
    clean, corrupt = tokenizer([e.clean for e in drawn]), tokenizer([e.corrupt for e in drawn])
    _check_aligned(tokenizer, drawn, clean, corrupt)
    words = {w for e in drawn for w in (e.correct, e.wrong, *e.answers)}
    ids = {word: tokenizer.token(f" {word}") for word in words}
    answers = None
    if drawn[0].answers:
        table = np.zeros((n, tokenizer.vocab_size), bool)
        for row, e in zip(table, drawn, strict=True):
            row[[ids[word] for word in e.answers]] = True
        answers = jnp.asarray(table)
    # A word's token is the last one of the text up to the word's end.
    prefixes = {name: tokenizer([e.clean[: e.ends[name]] for e in drawn]) for name in drawn[0].ends}
    positions = {name: clean.resolve(prefix.lengths - 1) for name, prefix in prefixes.items()}
    return Pairs(
        clean=clean,
        corrupt=corrupt,
        correct=jnp.asarray([ids[e.correct] for e in drawn]),
        wrong=jnp.asarray([ids[e.wrong] for e in drawn]),
        positions=positions | {"END": clean.resolve(-1)},
        answers=answers,
        clean_text=tuple(e.clean for e in drawn),
        corrupt_text=tuple(e.corrupt for e in drawn),
    )


def _check_aligned(tokenizer: Tokenizer, drawn: list[Example], clean: Prompts, corrupt: Prompts) -> None:
    differ = np.flatnonzero(np.asarray(clean.lengths != corrupt.lengths))
    if differ.size:
        pair = drawn[differ[0]]
        left, right = tokenizer.str_tokens(pair.clean), tokenizer.str_tokens(pair.corrupt)
        raise PairingError(
            f"{differ.size} of {len(drawn)} pairs do not line up; the first has {len(left)} clean and {len(right)} "
            f"corrupt tokens:\n  clean   {left}\n  corrupt {right}\nBoth need the same number. Use a "
            "tokenizer in which the words that the task exchanges are one token each, such as that of `tasks-4l`."
        )
