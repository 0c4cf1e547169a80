"""Layers that differ in kind, as a short list of segments: a pattern of kinds and how often it repeats."""

from dataclasses import dataclass

from mechjax.models.config import Config

_LONGEST = 8  # blocks of one pattern; each is compiled once


@dataclass(frozen=True)
class Segment:
    """`repeats` times the blocks of `kinds`, from layer `start` on."""

    start: int
    kinds: tuple[int, ...]
    repeats: int


def kinds_of(config: Config) -> tuple[int, ...]:
    """For each layer 1 where it has experts, 0 where an MLP."""
    return tuple(int(layer in config.expert_layers) for layer in range(config.n_layers))


def segments(kinds: tuple[int, ...]) -> tuple[Segment, ...]:
    """From each layer on the pattern that, repeated, goes farthest for its length; together they are all layers."""
    found, start = [], 0
    while start < len(kinds):
        best = max((_from(kinds, start, n) for n in range(1, _LONGEST + 1)), key=_gain)
        found.append(best)
        start += len(best.kinds) * best.repeats
    return tuple(found)


def _from(kinds: tuple[int, ...], start: int, n: int) -> Segment:
    pattern, repeats = kinds[start : start + n], 1
    while pattern == kinds[start + n * repeats : start + n * (repeats + 1)]:
        repeats += 1
    return Segment(start, pattern, repeats)


def _gain(segment: Segment) -> tuple[int, int]:
    """Layers that need no program of their own; of equals, the shortest pattern."""
    return len(segment.kinds) * (segment.repeats - 1), -len(segment.kinds)
