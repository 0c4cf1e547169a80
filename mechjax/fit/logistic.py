"""Logistic regression, to its optimum: linear probes of activations, one or very many as one program.

    minimise over w, b:    sum_i s_i log(1 + exp(-t_i (x_i . w + b))) + l1 |w|_1 + l2 |w|^2 / 2        t_i = +-1

with rows `x`, t_i = 1 where `y` is true, and `weights` s. The bias is free. Terms are summed over rows, as in
scikit-learn: its C is 1 / l2, its `class_weight` a choice of weights. A weight of 0 leaves a row out, and a column of
zeros gets a weight of 0: rows and columns that probes do not share are data, and new ones need no new program.

Method: Newton steps solved by conjugate gradients. With `l1` each follows a step of soft thresholding, which says which
weights are not 0, and keeps their signs (Byrd, Chin, Nocedal and Oztoprak 2016, "A family of second-order methods for
convex l1-regularized optimization", doi:10.1007/s10107-015-0965-3). Columns are centred inside, which changes no
optimum, since the bias is free.

Cost: some tens of products of `x` with a vector for each probe; those of probes that share `x` are one matrix product.
Exact when: `residual` is small; it is the largest derivative over the most that rounding and rows of that size could
make it. Misleads when: rows are separable and the penalties tiny: lengths of weights then tell of the penalty alone.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.records import Record

MOST_INNER = 200
"""Most products in one Newton step."""
IDLE = 6
"""Steps near the optimum that may pass without the residual falling by a tenth: it is at what rounding leaves."""


class Logistic(Record):
    """Probes at their optimum.

    Attributes:
        weight: Shape (*probe, d).
        bias: One for each probe.
        residual: The largest derivative, over the most that rows of that size could make it: 0 at the optimum.
        steps: Newton steps that were taken.
    """

    weight: Float[Array, "*probe d"]
    bias: Float[Array, "*probe"]
    residual: Float[Array, "*probe"]
    steps: Int[Array, "*probe"]

    def margins(self, x: Float[Array, "row d"]) -> Float[Array, "*probe row"]:
        """How far each row is on the side of the class, in the probe's units; its probability is their sigmoid."""
        return _product(self.weight, x.T) + self.bias[..., None]


def logistic(
    x: Float[Array | np.ndarray, "row d"],
    y: Bool[Array | np.ndarray, "*probe row"],
    *,
    weights: Float[Array | np.ndarray, "*probe row"] | None = None,
    l1: float | None = None,
    l2: float = 1.0,
    tolerance: float = 1e-6,
    steps: int = 100,
) -> Logistic:
    """Fit a probe to each row of `y`, all to the rows of `x`.

    Args:
        x: What is read.
        y: For each probe, which rows are of its class.
        weights: For each probe what each row counts; None for 1.
        l1: Penalty on the size of weights; None for none.
        l2: Penalty on half the square of weights, for all rows together.
        tolerance: Of `residual`.
        steps: Most Newton steps.

    Raises:
        ShapeError: Rows of `y` or `weights` of another length than `x`.
        ArgumentError: Numbers that are NaN or infinite, negative weights or penalties, no penalty, or a probe with
            rows of one class only.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    floats = jnp.issubdtype(x.dtype, jnp.floating) and y.dtype == bool
    if (
        not floats
        or x.ndim != 2
        or y.shape[-1:] != x.shape[:1]
        or np.shape(y if weights is None else weights) != y.shape
    ):
        raise ShapeError(
            f"x has shape {x.shape} and dtype {x.dtype}, y {y.shape} and {y.dtype}, weights "
            f"{None if weights is None else np.shape(weights)}: give x as floating-point numbers (row, d), y as truth "
            "values (*probe, row), and weights in the shape of y."
        )
    x = x.astype(x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32)
    given = jnp.ones(y.shape, x.dtype) if weights is None else jnp.asarray(weights, x.dtype)
    if not (jnp.isfinite(x).all() and jnp.isfinite(given).all() and (given >= 0).all()):
        raise ArgumentError(
            "x or weights hold NaN or infinity, or a weight is negative: every probe would be NaN. Leave such rows out "
            "of both."
        )
    if l2 < 0 or (l1 or 0) < 0 or l2 + (l1 or 0) <= 0 or steps < 1:
        raise ArgumentError(
            f"l1={l1}, l2={l2}, steps={steps}: penalties are 0 or more, one of them more than 0 (rows that can be "
            "separated have no optimum without), and there is at least one step."
        )
    alone = np.argwhere(np.asarray(~(jnp.where(y, given, 0).any(-1) & jnp.where(y, 0, given).any(-1))))
    if len(alone):
        raise ArgumentError(
            f"{len(alone)} probes, first {alone[0].tolist()}, have rows of one class only: give each probe rows of its "
            "class and other rows, of weight above 0."
        )
    penalty = None if l1 is None else jnp.asarray(l1, x.dtype)
    numbers = jnp.asarray(l2, x.dtype), jnp.asarray(tolerance, x.dtype), jnp.asarray(steps, jnp.int32)
    return _fitted(x, y, given, penalty, *numbers)


@eqx.filter_jit
def _fitted(
    x: Array, y: Array, weights: Array, l1: Array | None, l2: Array, tolerance: Array, steps: Array
) -> Logistic:
    own = partial(optimum, x, l1=l1, l2=l2, tolerance=tolerance, steps=steps)
    for _ in y.shape[:-1]:
        own = jax.vmap(own)
    return own(y, weights)


def optimum(
    x: Float[Array, "row d"],
    y: Bool[Array, " row"],
    weights: Float[Array, " row"],
    *,
    l1: Float[Array, ""] | None = None,
    l2: Float[Array, ""] | float = 1.0,
    tolerance: Float[Array, ""] | float = 1e-6,
    steps: Int[Array, ""] | int = 100,
) -> Logistic:
    """One probe, unchecked, as a pure function to `vmap`: what `logistic` and methods that use probes are made of."""
    mean = x.mean(0)
    x = x - mean
    penalties = (jnp.asarray(0 if l is None else l, x.dtype) for l in (l1, l2))
    problem = _Problem(x, x * x, jnp.abs(x), y, weights, *penalties, sparse=l1 is not None)
    of_class, of_rest = (jnp.where(side, weights, 0).sum() for side in (y, ~y))
    bias = jnp.log(of_class) - jnp.log(of_rest)

    def step(carry: _Search) -> _Search:
        """The residual here, and, where that is too large and still falls, the next place."""
        here = carry.place
        slopes = problem.slopes(here)
        residual = problem.residual(here, slopes)
        near = (residual < 100 * tolerance).astype(jnp.int32)  # before, residuals may rise for some steps
        idle = jnp.where(residual < 0.9 * carry.best, 0, carry.idle + near)
        going = (residual > tolerance) & (idle < IDLE) & (carry.steps < steps)
        there = problem.newton(here, slopes, residual, going)
        place = jax.tree.map(lambda a, b: jnp.where(going, a, b), there, here)
        taken = carry.steps + going.astype(jnp.int32)
        return _Search(place, residual, jnp.minimum(carry.best, residual), idle, taken, going)

    far = jnp.asarray(jnp.inf, x.dtype)
    start = _Place(jnp.zeros_like(mean), bias, jnp.full_like(weights, bias))
    search = _Search(start, far, far, jnp.int32(0), jnp.int32(0), jnp.array(True))
    end = lax.while_loop(lambda carry: carry.going, step, search)
    w, b = end.place.w, end.place.b
    return Logistic(w, b - _product(mean, w), end.residual, end.steps)


class _Place(eqx.Module):
    """Weights, the bias of centred rows, and the margins that they give."""

    w: Array
    b: Array
    m: Array


class _Search(eqx.Module):
    """Where the search is, its residual there, the least so far, for how long it has not fallen, and steps."""

    place: _Place
    residual: Array
    best: Array
    idle: Array
    steps: Array
    going: Array


class _Slopes(eqx.Module):
    """Derivatives at each margin, at the weights without that of `l1`, and at the bias."""

    r: Array
    g: Array
    g_b: Array


class _Problem(eqx.Module):
    """What is minimised: centred rows, their squares and sizes, their classes and weights, and the penalties."""

    x: Array
    squares: Array
    sizes: Array
    y: Array
    s: Array
    l1: Array
    l2: Array
    sparse: bool = eqx.field(static=True)

    def value(self, at: _Place) -> Array:
        """What is minimised."""
        loss = (self.s * jax.nn.softplus(jnp.where(self.y, -at.m, at.m))).sum()
        value = loss + self.l2 * (at.w * at.w).sum() / 2
        return value + self.l1 * jnp.abs(at.w).sum() if self.sparse else value

    def slopes(self, at: _Place) -> _Slopes:
        """Its derivatives."""
        p, q = jax.nn.sigmoid(at.m), jax.nn.sigmoid(-at.m)
        r = self.s * jnp.where(self.y, -q, p)  # not p - 1, which is 0 where q is small
        return _Slopes(r, _product(r, self.x) + self.l2 * at.w, r.sum())

    def residual(self, at: _Place, slopes: _Slopes) -> Array:
        """The largest derivative, over the size of what it is a sum of."""
        of_rows = (slopes.r * slopes.r / jnp.maximum(self.s, _tiny(self.s))).sum()
        size = lambda column: jnp.sqrt(column * of_rows)
        g, of_w = slopes.g, size(_product(self.s, self.squares)) + self.l2 * jnp.abs(at.w)
        if self.sparse:
            of_w = of_w + self.l1
            outside = jnp.sign(g) * jnp.maximum(jnp.abs(g) - self.l1, 0)
            g = jnp.where(at.w == 0, outside, g + self.l1 * jnp.sign(at.w))
        over = lambda part, whole: jnp.abs(part) / jnp.maximum(whole, _tiny(whole))
        return jnp.maximum(over(g, of_w).max(), over(slopes.g_b, size(self.s.sum())))

    def newton(self, at: _Place, slopes: _Slopes, residual: Array, going: Array) -> _Place:
        """The place after one step; with `l1` a step of soft thresholding goes before it."""
        signs, g = None, slopes.g
        if self.sparse:
            at = self.thresholded(at, slopes)
            signs, slopes = jnp.sign(at.w), self.slopes(at)
            g = slopes.g * jnp.abs(signs) + self.l1 * signs
        accuracy = jnp.where(going, jnp.minimum(0.1, jnp.sqrt(residual)), jnp.inf)
        by, by_b = self.direction(at, (g, slopes.g_b), signs, accuracy)
        along = _product(self.x, by) + by_b
        slope, value = (g * by).sum() + slopes.g_b * by_b, self.value(at)
        spare = 4 * jnp.finfo(value.dtype).eps * jnp.abs(value)

        def worse(carry: tuple[Array, Array, _Place]) -> Array:
            t, found, _ = carry
            return ~(found <= value + 1e-4 * t * slope + spare) & (t > 1e-6)

        def halved(carry: tuple[Array, Array, _Place]) -> tuple[Array, Array, _Place]:
            t = carry[0] / 2
            w, b = at.w + t * by, at.b + t * by_b
            if signs is None:
                new = _Place(w, b, at.m + t * along)
            else:
                w = jnp.where(jnp.sign(w) == signs, w, 0)
                new = _Place(w, b, _product(self.x, w) + b)
            return t, self.value(new), new

        begin = jnp.full_like(value, 2), jnp.full_like(value, jnp.inf), at
        t, _, new = lax.while_loop(worse, halved, begin)
        return jax.tree.map(lambda a, b: jnp.where(t > 1e-6, a, b), new, at)

    def thresholded(self, at: _Place, slopes: _Slopes) -> _Place:
        """After a step of soft thresholding, as long in each column as is sure to lower the value."""
        share = self.s * (self.sizes.sum(1) + 1) / 4  # a bound on the curvature, column by column
        most = _product(share, self.sizes) + self.l2
        most = jnp.maximum(most, _tiny(most))
        w = at.w - slopes.g / most
        w = jnp.sign(w) * jnp.maximum(jnp.abs(w) - self.l1 / most, 0)
        b = at.b - slopes.g_b / share.sum()
        return _Place(w, b, _product(self.x, w) + b)

    def direction(
        self, at: _Place, g: tuple[Array, Array], signs: Array | None, accuracy: Array
    ) -> tuple[Array, Array]:
        """Newton's step over weights that are not held at 0, by conjugate gradients."""
        h = self.s * jax.nn.sigmoid(at.m) * jax.nn.sigmoid(-at.m)
        free = jnp.ones_like(at.w) if signs is None else jnp.abs(signs)
        eps = jnp.finfo(h.dtype).eps
        scale = _product(h, self.squares) + self.l2
        scale, scale_b = scale + eps * scale.max(), h.sum() + eps * self.s.sum()
        inner = lambda u, v: (u[0] * v[0]).sum() + u[1] * v[1]
        moved = lambda u, t, v: jax.tree.map(lambda a, b: a + t * b, u, v)
        eased = lambda v: (v[0] / scale, v[1] / scale_b)
        start = jax.tree.map(jnp.negative, g)
        most = accuracy**2 * inner(start, eased(start))

        def unfinished(carry: tuple[Any, ...]) -> Array:
            _, _, _, rz, i = carry
            return (rz > most) & (i < MOST_INNER)

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            v, r, d, rz, i = carry
            z = h * (_product(self.x, d[0]) + d[1])
            curved = free * _product(z, self.x) + self.l2 * d[0], z.sum()
            t = rz / jnp.maximum(inner(d, curved), _tiny(rz))
            r = moved(r, -t, curved)
            now = inner(r, eased(r))
            return moved(v, t, d), r, moved(eased(r), now / rz, d), now, i + 1

        zero = jax.tree.map(jnp.zeros_like, start)
        begin = zero, start, eased(start), inner(start, eased(start)), 0
        return lax.while_loop(unfinished, step, begin)[0]


def _product(a: Array, b: Array) -> Array:
    """`a b`, in float32 where both are (a TPU's default for these is bfloat16)."""
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST)


def _tiny(like: Array) -> float:
    return float(jnp.finfo(like.dtype).tiny)
