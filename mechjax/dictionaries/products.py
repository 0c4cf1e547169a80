"""Products with few latents: what is read at chosen latents, and what they write, with gradients of the same cost.

A dense training step of B tokens, d numbers each and F latents costs 10 d F B operations; where k latents of each
token are active, these products leave 2 d F B + 8 d k B. They take B pairs of a token and a latent at a time, so
nothing of the size B k d is formed. Gradients equal those of dense products, which are used where they are faster.

Reference: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", arXiv:2406.04093, appendix D.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.parallel.mesh import n_model

CROSSOVER = {"cpu": 10, "gpu": 206, "tpu": 240}
"""Latents in all for each active one from which sparse products are faster: peak rate by bandwidth, per number read (a
GPU's is an H200's, a TPU's a v5e's: estimates)."""
ELSEWHERE = 206
BLOCK = {"cpu": 2**16}
"""Numbers that are added to rows of a gradient at a time: what a core's cache holds on a CPU (measured: a third of the
time of whole columns at d = 256, k = 32), more elsewhere, where each time has its own cost."""
BLOCK_ELSEWHERE = 2**24


def few(n_features: int, k: int) -> bool:
    """Whether products with `k` latents of each token are faster than with all, on the platform that is there.

    Never on a mesh that splits latents: rows of a split matrix cannot be picked without bringing it together.
    """
    return n_model() == 1 and n_features > CROSSOVER.get(jax.default_backend(), ELSEWHERE) * k


class Codes(eqx.Module):
    """Latents of tokens: all of them in their order, or few, as pairs of a token and a latent, none of them twice.

    A pair whose value is 0 is not active. Of several layers, each array has these first.

    Attributes:
        values: Shape (batch, feature), or (batch, k) for as many pairs.
        indices: Each pair's latent; None where `values` are all latents.
        tokens: Each pair's token; None where it is the one of its row.
        columns: How many columns of pairs hold any; None for all.
    """

    values: Float[Array, "*layer batch k"]
    indices: Int[Array, "*layer batch k"] | None = None
    tokens: Int[Array, "*layer batch k"] | None = None
    columns: Int[Array, "*layer"] | None = None

    def holding(self, values: Float[Array, "batch k"]) -> "Codes":
        """The same pairs with other values."""
        return Codes(values, self.indices, self.tokens, self.columns)

    def few(self, n_features: int) -> bool:
        """Whether products go by pairs."""
        return self.indices is not None and few(n_features, self.values.shape[1])

    def dense(self, n_features: int) -> Float[Array, "batch feature"]:
        """All latents of all tokens."""
        if self.indices is None:
            return self.values
        own = jnp.arange(len(self.values), dtype=self.indices.dtype)[:, None]
        rows = own if self.tokens is None else self.tokens
        return (
            jnp.zeros((len(self.values), n_features), self.values.dtype)
            .at[rows, self.indices]
            .add(self.values)
        )

    def at(self, dense: Float[Array, "batch feature"]) -> Float[Array, "batch k"]:
        """What stands in `dense` at the pairs."""
        if self.indices is None:
            return dense
        own = jnp.arange(len(self.values), dtype=self.indices.dtype)[:, None]
        return dense[own if self.tokens is None else self.tokens, self.indices]

    def of_latents(self, x: Float[Array, " feature"]) -> Float[Array, "#batch k"]:
        """Of a number per latent, those of the pairs."""
        return x[None] if self.indices is None else x[self.indices]

    def fired(self, n_features: int) -> Int[Array, " feature"]:
        """For each latent the number of tokens in which it is active."""
        active = (self.values != 0).astype(jnp.int32)
        if self.indices is None:
            return active.sum(0)
        return jnp.zeros(n_features, jnp.int32).at[self.indices.reshape(-1)].add(active.reshape(-1))


def pairs(
    values: Float[Array, "batch k"], indices: Int[Array, "batch k"], kept: Bool[Array, "batch k"]
) -> Codes:
    """Pairs that are kept, moved together, so that columns of none are not gone through; -inf stands for no pair."""
    order = jnp.argsort(~kept.reshape(-1), stable=True).reshape(values.shape[::-1]).T
    taken = jnp.where(kept, values, -jnp.inf).reshape(-1)[order]
    tokens = (order // values.shape[1]).astype(indices.dtype)
    columns = -(-kept.sum(dtype=jnp.int32) // jnp.int32(len(values)))
    return Codes(taken, indices.reshape(-1)[order], tokens, columns)


def at_least_float32(dtype: Any) -> Any:
    """`dtype`, or float32 where it is narrower: what moves by little does not move at all in bfloat16."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


def product(x: Float[Array, "*batch n"], W: Float[Array, "n m"]) -> Float[Array, "*batch m"]:
    """`x W`, in float32 where both are (a TPU's default for these is bfloat16)."""
    exact = x.dtype == W.dtype == jnp.float32
    return jnp.dot(x, W, precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT)


@jax.custom_vjp
def read(
    x: Float[Array, "batch n"], W: Float[Array, "n feature"], b: Float[Array, " feature"], found: Codes
) -> Float[Array, "batch k"]:
    """`x W + b` at pairs, where `found` holds what stands there.

    Differentiable in `W` and `b` alone: `x` is data.
    """
    return found.values


def _read(x: Array, W: Array, b: Array, found: Codes) -> tuple[Array, Any]:
    return found.values, (x, W.shape, b, found)


def _read_back(kept: Any, g: Array) -> tuple[Array | None, ...]:
    x, shape, b, found = kept
    at = found.holding(g)
    at_b = g.sum(0) if found.indices is None else jnp.zeros_like(b).at[found.indices].add(g)
    return None, _gathered(at, x, shape[1]).T, at_b, None


read.defvjp(_read, _read_back)


def write(found: Codes, W: Float[Array, "feature n"]) -> Float[Array, "batch n"]:
    """What latents write: for each token the sum of their rows of `W`, each times its value."""
    return _write(found.values, found.holding(lax.stop_gradient(found.values)), W)


@jax.custom_vjp
def _write(values: Array, at: Codes, W: Array) -> Array:
    found = at.holding(values)
    if not found.few(len(W)):
        return product(found.dense(len(W)), W)

    def column(total: Array, value: Array, index: Array, token: Array | None) -> Array:
        rows = value[:, None] * W[index]
        return total + rows if token is None else total.at[token].add(rows)

    return _over_columns(found, column, jnp.zeros((len(values), W.shape[1]), W.dtype))


def _write_forth(values: Array, at: Codes, W: Array) -> tuple[Array, Any]:
    return _write(values, at, W), (values, at, W)


def _write_back(kept: Any, g: Array) -> tuple[Array | None, ...]:
    values, at, W = kept
    found = at.holding(values)
    return _along(found, W, g), None, _gathered(found, g, len(W))


_write.defvjp(_write_forth, _write_back)


def _along(found: Codes, W: Array, g: Array) -> Float[Array, "batch k"]:
    """Each pair's row of `W` times its token's `g`."""
    if found.indices is None or not found.few(len(W)):
        return found.at(product(g, W.T))
    indices, tokens = found.indices, found.tokens

    def column(i: Array, out: Array) -> Array:
        own = g if tokens is None else g[tokens[:, i]]
        return out.at[:, i].set((W[indices[:, i]] * own).sum(-1))

    return lax.fori_loop(0, _n_columns(found), column, jnp.zeros_like(found.values))


def _gathered(found: Codes, rows: Float[Array, "batch n"], n_features: int) -> Float[Array, "feature n"]:
    """For each latent the sum of its tokens' rows, each times the value there."""
    if found.indices is None or not found.few(n_features):
        return product(found.dense(n_features).T, rows)
    (batch, k), n = found.values.shape, rows.shape[1]
    zero = jnp.zeros((n_features, n), rows.dtype)
    indices, tokens = found.indices, found.tokens
    if tokens is None:
        some = _divisor(batch, k * n)
        cut = lambda x: x.reshape(-1, some, *x.shape[1:])

        def of_tokens(total: Array, block: tuple[Array, ...]) -> tuple[Array, None]:
            value, index, row = block
            add = value[..., None] * row[:, None]
            return total.at[index.reshape(-1)].add(add.reshape(-1, n)), None

        return lax.scan(of_tokens, zero, (cut(found.values), cut(indices), cut(rows)))[0]
    some = _divisor(batch, n)
    value, index, token = (x.T.reshape(-1, some) for x in (found.values, indices, tokens))
    of_pairs = lambda i, total: total.at[index[i]].add(value[i][:, None] * rows[token[i]])
    return lax.fori_loop(0, _n_columns(found) * (batch // some), of_pairs, zero)


def _divisor(batch: int, numbers: int) -> int:
    """As many of a batch, each so many numbers, as are well added at a time: a divisor of the batch."""
    most = max(1, BLOCK.get(jax.default_backend(), BLOCK_ELSEWHERE) // numbers)
    return next(n for n in range(min(most, batch), 0, -1) if batch % n == 0)


def _over_columns(found: Codes, add: Any, zero: Array) -> Array:
    """`add(total, values, indices, tokens)` of every column of pairs that holds any."""
    values, indices, tokens = jax.tree.map(lambda x: x.T, (found.values, found.indices, found.tokens))
    at = lambda x, i: None if x is None else lax.dynamic_index_in_dim(x, i, keepdims=False)
    column = lambda i, total: add(total, values[i], at(indices, i), at(tokens, i))
    return lax.fori_loop(0, _n_columns(found), column, zero)


def _n_columns(found: Codes) -> Any:
    return found.values.shape[1] if found.columns is None else found.columns
