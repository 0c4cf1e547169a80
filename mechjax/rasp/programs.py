"""Standard programs: those of RASP and Tracr, and a few that are needed to find circuits in.

Weiss et al. 2021, arXiv:2106.06981, section 3 (reverse, histograms, sort, most frequent, Dyck); Lindner et al. 2023,
arXiv:2301.05062 (fractions, patterns, counts). `STANDARD` has each with a small vocabulary, ready to compile.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from mechjax.rasp.expressions import (
    Aggregate,
    LinearSequenceMap,
    Map,
    Select,
    SelectorWidth,
    SequenceMap,
    SOp,
    always,
    equal,
    indices,
    tokens,
)


def length() -> SOp:
    """The number of tokens, at every position. Needs a model that is not causal."""
    return SelectorWidth(Select(tokens, tokens, always), name="length")


def reverse() -> SOp:
    """The tokens from the last to the first: the length, then where to look, then a look there. Not causal."""
    opposite = SequenceMap(lambda n, i: n - i - 1, length(), indices, name="opposite")
    return Aggregate(Select(indices, opposite, equal), tokens, name="reverse")


def hist() -> SOp:
    """How often each position's token occurs."""
    return SelectorWidth(Select(tokens, tokens, equal), name="hist")


def double_hist() -> SOp:
    """How many different tokens occur as often as each position's does."""
    often = hist()
    kind = SequenceMap(lambda n, new: (n, new), often, is_first(), name="hist_and_first")
    return SelectorWidth(Select(kind, often, lambda key, query: key == (query, True)), name="double_hist")


def sort() -> SOp:
    """The tokens in order, equal ones too: each one's rank, then a look at the position of one's own. Not causal."""
    return Aggregate(Select(_rank(tokens), indices, equal), tokens, name="sort")


def sort_by_frequency() -> SOp:
    """The tokens, those that occur most often first, equally frequent ones as they come. Not causal."""
    rare = Map(lambda n: -n, hist(), name="rareness")
    return Aggregate(Select(_rank(rare), indices, equal), tokens, name="sort_by_frequency")


def most_frequent() -> SOp:
    """The token that occurs most often, at every position; the first of equally frequent ones. Not causal."""
    rare = Map(lambda n: -n, hist(), name="rareness")
    return Aggregate(Select(_rank(rare), tokens, lambda key, query: key == 0), tokens, name="most_frequent")


def dyck(opens: str = "(", closes: str = ")") -> SOp:
    """Whether the parentheses of every kind balance, each kind by itself ("shuffle-Dyck"), at every position.

    For each kind the balance of each prefix: none may be negative, and the last is zero. Not causal.
    """
    last = Map(lambda n: n - 1, length(), name="last")
    balanced: SOp | None = None
    for left, right in zip(opens, closes, strict=True):
        both = left + right
        sign = Map(lambda x: (x > 0) - (x < 0), pair_balance(left, right), name=f"sign_{both}")
        negative = Map(lambda s: int(s < 0), sign, encoding="numerical", name=f"negative_{both}")
        ever = Aggregate(Select(tokens, tokens, always), negative, name=f"negatives_{both}")
        never = Map(lambda share: share == 0, ever, name=f"never_negative_{both}")
        final = Aggregate(Select(indices, last, equal), sign, name=f"final_{both}")
        own = SequenceMap(lambda fine, s: fine and s == 0, never, final, name=f"balanced_{both}")
        balanced = own if balanced is None else SequenceMap(_both, balanced, own, name="balanced")
    return Map(lambda token: True, tokens) if balanced is None else balanced


def pair_balance(left: str = "(", right: str = ")") -> SOp:
    """Of the tokens so far, the share of `left` less the share of `right`: a number from -1 to 1."""
    return LinearSequenceMap(frac_prevs(left), frac_prevs(right), 1.0, -1.0, name=f"balance_{left}{right}")


def frac_prevs(token: Hashable) -> SOp:
    """The share of `token` among the tokens so far, a number."""
    is_token = Map(lambda t: t == token, tokens, encoding="numerical", name=f"is_{token}")
    return Aggregate(_so_far(), is_token, name=f"frac_{token}")


def shift_by(offset: int, of: SOp = tokens, default: Any = None) -> SOp:
    """The sequence moved `offset` positions on; `default` where nothing moves to. Causal models need `offset` >= 0."""
    moved = Select(indices, indices, lambda key, query: key + offset == query)
    return Aggregate(moved, of, default, name=f"{of.label}_shifted_by_{offset}")


def detect_pattern(pattern: str) -> SOp:
    """Whether the tokens up to each position end in `pattern`."""
    found = Map(lambda token: token == pattern[-1], tokens, name=f"is_{pattern[-1]}")
    for back in range(1, len(pattern)):
        wanted = pattern[-1 - back]
        there = Map(lambda t, wanted=wanted: t == wanted, shift_by(back), name=f"{wanted}_{back}_back")
        found = SequenceMap(_both, found, there, name=f"ends_in_{pattern[-1 - back :]}")
    return found


def count(token: Hashable) -> SOp:
    """How often `token` occurs, at every position."""
    return SelectorWidth(Select(tokens, tokens, lambda key, query: key == token), name=f"count_{token}")


def count_rare(limit: int) -> SOp:
    """How many positions hold tokens that occur less than `limit` times."""
    return SelectorWidth(Select(hist(), tokens, lambda key, query: key < limit), name="count_rare")


def is_first() -> SOp:
    """Whether each position's token has not occurred before."""
    place = SequenceMap(lambda token, i: (token, i), tokens, indices, name="place")
    earlier = Select(place, place, lambda key, query: key[0] == query[0] and key[1] < query[1])
    return Map(lambda n: n == 0, SelectorWidth(earlier, name="earlier"), name="is_first")


def parity(token: Hashable) -> SOp:
    """Whether `token` occurs an odd number of times."""
    return Map(lambda n: n % 2 == 1, count(token), name="parity")


def after_first(token: Hashable) -> SOp:
    """The token that follows the first `token`, at every position; None where there is none."""
    first = SequenceMap(lambda t, new: new and t == token, tokens, is_first(), name=f"first_{token}")
    follows = Select(shift_by(1, first, default=False), tokens, lambda key, query: key)
    return Aggregate(follows, tokens, None, name=f"after_first_{token}")


def _so_far() -> Select:
    return Select(indices, indices, lambda key, query: key <= query)


def _rank(of: SOp) -> SOp:
    """How many positions come before each one, in order of values and then of positions."""
    place = SequenceMap(lambda value, i: (value, i), of, indices, name="place")
    return SelectorWidth(Select(place, place, lambda key, query: key < query), name="rank")


def _both(first: bool, second: bool) -> bool:
    return first and second


@dataclass(frozen=True)
class Standard:
    """A program with what it is compiled for.

    Attributes:
        make: Makes the program.
        vocabulary: Its tokens.
        causal: Whether it is meant for a model that sees only what was before.
    """

    make: Callable[[], SOp]
    vocabulary: tuple[Hashable, ...]
    causal: bool = False


STANDARD: dict[str, Standard] = {
    "length": Standard(length, ("a", "b")),
    "reverse": Standard(reverse, ("a", "b", "c")),
    "hist": Standard(hist, ("a", "b", "c")),
    "double_hist": Standard(double_hist, ("a", "b", "c")),
    "sort": Standard(sort, (1, 2, 3)),
    "sort_by_frequency": Standard(sort_by_frequency, ("a", "b", "c")),
    "most_frequent": Standard(most_frequent, ("a", "b", "c")),
    "dyck": Standard(dyck, ("(", ")")),
    "shuffle_dyck": Standard(lambda: dyck("([", ")]"), ("(", ")", "[", "]")),
    "pair_balance": Standard(pair_balance, ("(", ")", "x"), causal=True),
    "frac_prevs": Standard(lambda: frac_prevs("x"), ("w", "x", "y"), causal=True),
    "shift": Standard(lambda: shift_by(2), ("a", "b", "c"), causal=True),
    "detect_pattern": Standard(lambda: detect_pattern("abc"), ("a", "b", "c"), causal=True),
    "count": Standard(lambda: count("a"), ("a", "b"), causal=True),
    "count_rare": Standard(lambda: count_rare(2), ("a", "b", "c")),
    "is_first": Standard(is_first, ("a", "b", "c"), causal=True),
    "parity": Standard(lambda: parity("a"), ("a", "b")),
    "after_first": Standard(lambda: after_first("a"), ("a", "b", "c")),
}
"""Name -> a program ready for `compile_program(standard.make(), standard.vocabulary, max_length)`."""
