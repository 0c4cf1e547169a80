"""Mean and spread of activations, gathered shard by shard in double precision.

The mean and the sum of squared deviations of each part are merged as Chan, Golub and LeVeque (1979, "Updating formulae
and a pairwise algorithm for computing sample variances", eq. 2.1) have it: no sum of squares is formed of which a mean
must be taken away again, so data far from zero lose nothing. Parts follow from the rows and come in their order, so
that the bits do not depend on how often writing was broken off.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Float

from mechjax.base.records import Record

_AT_ONCE = 1024  # rows that are brought to double precision together


class Moments(Record):
    """Mean and spread of rows, each dimension by itself.

    Attributes:
        mean: Of each dimension.
        squares: Of each dimension the sum over rows of squared deviations from its mean.
        count: How many rows.
    """

    mean: Float[np.ndarray, "width"]
    squares: Float[np.ndarray, "width"]
    count: int = eqx.field(static=True)

    @property
    def variance(self) -> Float[np.ndarray, "width"]:
        """Mean squared deviation of each dimension from its mean."""
        return self.squares / max(self.count, 1)

    @property
    def second_moment(self) -> Float[np.ndarray, "width"]:
        """Mean square of each dimension."""
        return self.variance + self.mean**2

    @property
    def mean_square(self) -> float:
        """Mean square over rows and dimensions: what training divides by is its root."""
        return float(self.second_moment.mean())


def no_moments(width: int) -> Moments:
    """Those of no rows."""
    return Moments(np.zeros(width), np.zeros(width), 0)


def moments_of(rows: Float[np.ndarray, "row width"]) -> Moments:
    """Those of some rows, of any precision."""
    found = no_moments(rows.shape[1])
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE].astype(np.float64)
        mean = part.mean(0)
        part -= mean
        found = merged(found, Moments(mean, np.einsum("rw,rw->w", part, part), len(part)))
    return found


def merged(a: Moments, b: Moments) -> Moments:
    """Those of the rows of both."""
    count = a.count + b.count
    if not a.count or not b.count:
        return a if a.count else b
    apart = b.mean - a.mean
    squares = a.squares + b.squares + apart**2 * (a.count * b.count / count)
    return Moments(a.mean + apart * (b.count / count), squares, count)
