"""How well one list of scores agrees with another, ties counted as half."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.records import Record


class Agreement(Record):
    """How well scores agree with a truth.

    Attributes:
        pearson: Correlation of the two. NaN where one of them is constant.
        spearman: Correlation of their ranks.
        auroc: Chance that, of an item that is among the `n` largest of the truth in size and one that is not, the
            scores give the first the larger size (Mann and Whitney 1947).
        overlap: Share of the `n` largest of the truth that are among the `n` largest scores, in size.
        n: How many count as large (static).
    """

    pearson: Float[Array, ""]
    spearman: Float[Array, ""]
    auroc: Float[Array, ""]
    overlap: Float[Array, ""]
    n: int = eqx.field(static=True)


def agreement(
    scores: Float[Array | np.ndarray, " item"],
    truth: Float[Array | np.ndarray, " item"],
    n: int | None = None,
) -> Agreement:
    """How well `scores` agree with `truth`.

    Args:
        scores: What an approximation gives each item.
        truth: What is right.
        n: How many of the truth's items, largest in size, count as large; a tenth of them by default.

    Raises:
        ShapeError: Lists of different lengths.
        ArgumentError: `n` is not between 1 and the number of items less one, or a number is NaN.
    """
    s, t = (np.asarray(x, np.float64) for x in (scores, truth))
    if s.shape != t.shape or s.ndim != 1:
        raise ShapeError(
            f"scores of shape {s.shape} against a truth of shape {t.shape}: give one number per item each."
        )
    n = max(1, len(t) // 10) if n is None else n
    if not 0 < n < len(t):
        raise ArgumentError(f"n={n}: between 1 and {len(t) - 1} of {len(t)} items can count as large.")
    if np.isnan(s).any() or np.isnan(t).any():
        raise ArgumentError("some scores are NaN: there is no order to agree on.")
    large = np.argsort(-np.abs(t), kind="stable")[:n]
    found = np.argsort(-np.abs(s), kind="stable")[:n]
    of_large = ranks(np.abs(s))[large].sum()
    auroc = (of_large - n * (n + 1) / 2) / (n * (len(s) - n))
    number = lambda x: jnp.asarray(x, jnp.float32)
    return Agreement(
        pearson=number(_correlation(s, t)),
        spearman=number(_correlation(ranks(s), ranks(t))),
        auroc=number(auroc),
        overlap=number(len(set(large) & set(found)) / n),
        n=n,
    )


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value from 1 up; equal ones share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    return float((x * y).sum() / scale) if scale else float("nan")
