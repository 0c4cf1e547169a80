"""Where tokens stand: positions, who sees whom, rotation, ALiBi.

Positions count real tokens, so padding, wherever it stands, shifts nothing. Real tokens see real tokens and padding
sees padding: no row of attention is empty, so no NaN is born in padding, and none of it reaches a real position.

Rotation: Su et al. 2021, arXiv:2104.09864, Eq. 34; "halves" as in GPT-NeoX and Llama, "pairs" as in the paper.
ALiBi: Press et al. 2022, arXiv:2108.12409, section 3.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.models.cache import Cache
from mechjax.models.config import Config
from mechjax.models.rope import Rope
from mechjax.transform.select import is_concrete

_SEES_ALL = 2**31 - 1

Rotation = tuple[Float[Array, "... pos half"], Float[Array, "... pos half"]]
"""Cosine and sine of the angles."""


class Places(eqx.Module):
    """Where queries, or keys, stand. Without batch axes where all examples agree; the last axis is always theirs.

    Attributes:
        slot: A query sees the keys whose slots are not after its own; all 0 where it sees all. Shape (*batch, pos).
        real: Which are real tokens: these see real ones, and padding sees padding. Shape (*batch, pos); None where all
            are.
        order: Index of each among the real tokens. Shape (*batch, pos); None where no layer has a window.
        height: ALiBi: a score gains its key's and loses its query's. Shape (*batch, head, pos); None without.
    """

    slot: Int[Array, "... pos"]
    real: Bool[Array, "... pos"] | None = None
    order: Int[Array, "... pos"] | None = None
    height: Float[Array, "... head pos"] | None = None


class Sequence(eqx.Module):
    """What every layer needs to know of where the tokens stand. Without batch axes where all examples agree.

    Attributes:
        positions: Position of each token. Shape (*batch, pos).
        queries: Where the tokens stand.
        keys: Where those that they may see stand.
        rotation: Cosine and sine of the angles. Shapes (*batch, pos, rotary_dim / 2), where layers rotate differently
            (table, *batch, pos, rotary_dim / 2); None without rotation.
        causal: Whether it is known while tracing that the keys are the queries' own tokens, each of which sees those
            up to it (static).
    """

    positions: Int[Array, "... pos"]
    queries: Places
    keys: Places
    rotation: Rotation | None
    causal: bool = eqx.field(static=True, default=False)

    def only(self, at: Int[Array, "*batch"], config: Config) -> "Sequence":
        """As if of each example only the token `at` asked, of the same keys."""

        def row(x: Array, dims: int) -> Array:
            x = jnp.broadcast_to(x, (*at.shape, *x.shape[-dims:]))
            return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * dims), -1)

        q = self.queries
        real, order = (None if x is None else row(x, 1) for x in (q.real, q.order))
        queries = Places(row(q.slot, 1), real, order, None if q.height is None else row(q.height, 2))
        turn = lambda table: jnp.take_along_axis(
            jnp.broadcast_to(table, (*at.shape, *table.shape[-2:])), at[..., None, None], -2
        )
        turn = jax.vmap(turn) if len(set(config.ropes)) > 1 else turn
        rotation = None if self.rotation is None else (turn(self.rotation[0]), turn(self.rotation[1]))
        return Sequence(row(self.positions, 1), queries, self.keys, rotation)


class Varying(eqx.Module):
    """What differs from layer to layer without being a weight: of one layer, or of all with a leading layer axis.

    Attributes:
        window: How many positions a query sees; None where no layer has a window.
        table: Which of the sequence's rotations; None where all layers rotate alike.
    """

    window: Int[Array, "*layer"] | None
    table: Int[Array, "*layer"] | None

    def rotation(self, sequence: Sequence) -> Rotation | None:
        """Cosine and sine of this layer's angles; None without rotation."""
        if sequence.rotation is None or self.table is None:
            return sequence.rotation
        cos, sin = (lax.dynamic_index_in_dim(t, self.table, keepdims=False) for t in sequence.rotation)
        return cos, sin


def varying(config: Config) -> Varying:
    """What differs between the layers of a decoder."""
    windows = None
    if config.windows is not None:
        windows = jnp.array([_SEES_ALL if w is None else w for w in config.windows], jnp.int32)
    distinct = list(dict.fromkeys(config.ropes))
    tables = jnp.array([distinct.index(rope) for rope in config.ropes], jnp.int32)
    return Varying(windows, tables if len(distinct) > 1 else None)


def count_positions(n_pos: int, mask: Bool[Array, "*batch pos"] | None) -> Int[Array, "*positions"]:
    """Index of each token among the real tokens of its example; 0 for padding before the first."""
    if mask is None:
        return jnp.arange(n_pos, dtype=jnp.int32)
    return jnp.maximum(jnp.cumsum(mask, -1, dtype=jnp.int32) - 1, 0)


def arrange(
    config: Config,
    n_pos: int,
    mask: Bool[Array, "*batch pos"] | None,
    positions: Int[Array, "*batch pos"] | None,
    cache: Cache | None = None,
) -> Sequence:
    """Positions, visibility, rotation and ALiBi of `n_pos` tokens; keys are the slots of a cache that admitted them."""
    if cache is not None and not config.causal:
        raise ArgumentError(
            "This model is not causal (`causal` = False): each token sees those after it, so keys and values kept of "
            "earlier tokens would change with every further one. Run the whole text without a cache."
        )
    if cache is None:
        order = count_positions(n_pos, mask)
        positions = order if positions is None else positions
        slot = jnp.arange(n_pos, dtype=jnp.int32) if config.causal else jnp.zeros(n_pos, jnp.int32)
        queries = keys = _places(config, slot, mask, order, positions)
    else:
        positions = cache.next(cache.positions, n_pos)
        order, real = (cache.next(slots, n_pos) for slots in (cache.order, cache.real))
        queries = _places(config, cache.length + jnp.arange(n_pos), real, order, positions)
        keys = _places(config, jnp.arange(cache.n_slots), cache.real, cache.order, cache.positions)
    rotation = rotations(config, positions) if config.positions == "rotary" else None
    return Sequence(positions, queries, keys, rotation, causal=cache is None and config.causal)


def _places(config: Config, slot: Array, real: Array | None, order: Array, positions: Array) -> Places:
    height = alibi_heights(config, positions) if config.positions == "alibi" else None
    return Places(slot, real, None if config.windows is None else order, height)


def rotations(config: Config, positions: Int[Array, "*batch pos"]) -> Rotation:
    """Cosine and sine of every layer's angles, in float32; stacked where layers rotate differently."""
    tables = [angles(rope, config.rotary_dim, positions) for rope in dict.fromkeys(config.ropes)]
    if len(tables) == 1:
        return tables[0]
    cos, sin = (jnp.stack(parts) for parts in zip(*tables, strict=True))
    return cos, sin


def angles(rope: Rope | None, dim: int, positions: Int[Array, "*batch pos"]) -> Rotation:
    """Cosine and sine of positions times frequencies, in float32; of zero for a layer that does not rotate."""
    if rope is None:
        still = jnp.zeros((*positions.shape, dim // 2), jnp.float32)
        return jnp.ones_like(still), still
    frequencies = jnp.asarray(rope.frequencies(dim))
    if (other := rope.beyond(dim)) is not None:
        longest, long = other
        length = (
            positions.max(-1, keepdims=True)[..., None] + 1
        )  # each example's own, so that none moves another
        frequencies = jnp.where(length > longest, long, frequencies)
    angle = positions[..., None].astype(jnp.float32) * frequencies
    if rope.amplitude == 1.0:
        return jnp.cos(angle), jnp.sin(angle)
    return rope.amplitude * jnp.cos(angle), rope.amplitude * jnp.sin(angle)


def other_angles(config: Config) -> tuple[int, ...]:
    """Lengths of texts past which layers rotate by other angles."""
    ropes = (rope.beyond(config.rotary_dim) for rope in dict.fromkeys(config.ropes) if rope is not None)
    return tuple(beyond[0] for beyond in ropes if beyond is not None)


def outgrows(
    config: Config, before: Int[Array, "*batch"], after: Int[Array, "*batch"]
) -> Bool[Array, "*batch"]:
    """Whether a text of which keys are kept grows past a length where angles change, which those keys cannot follow."""
    passes = [(before > 0) & (before <= length) & (after > length) for length in other_angles(config)]
    return jnp.any(jnp.array(passes), 0) if passes else jnp.zeros(before.shape, bool)


def check_growth(config: Config, before: Int[Array, "*batch"], after: Int[Array, "*batch"]) -> None:
    """Refuse such texts, where that can be seen.

    Args:
        config: The model's.
        before: How long each text is already; 0 where nothing is kept of it yet.
        after: How long it will be.

    Raises:
        ShapeError: A text does.
    """
    if not other_angles(config) or not (is_concrete(before) and is_concrete(after)):
        return
    if (wrong := outgrows(config, before, after).reshape(-1)).any():
        row = int(wrong.argmax())
        start, end = int(before.reshape(-1)[row]), int(after.reshape(-1)[row])
        length = next(length for length in other_angles(config) if start <= length < end)
        raise ShapeError(
            f"The model rotates texts of more than {length} tokens by other angles, and text {row} grows from {start} "
            f"to {end} tokens: the keys it keeps would be turned wrongly from there on. Stay within {length}, or begin "
            "with more than that at once."
        )


def rotate(
    x: Float[Array, "*batch pos head d_head"],
    rotation: tuple[Float[Array, "*positions pos half"], Float[Array, "*positions pos half"]],
    config: Config,
) -> Float[Array, "*batch pos head d_head"]:
    """Rotate the first `rotary_dim` dimensions of each head."""
    cos, sin = (table[..., None, :].astype(x.dtype) for table in rotation)
    turning, still = x[..., : config.rotary_dim], x[..., config.rotary_dim :]
    if config.rotary_layout == "halves":
        first, second = jnp.split(turning, 2, -1)
    else:
        first, second = turning[..., ::2], turning[..., 1::2]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if config.rotary_layout == "halves":
        return jnp.concatenate((*turned, still), -1)
    return jnp.concatenate((jnp.stack(turned, -1).reshape(turning.shape), still), -1)


def alibi_slopes(n_heads: int) -> np.ndarray:
    """ALiBi's slope of each head: powers of `2**(-8 / n)`, filled up from `2n` where n is no power of two."""
    n = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-4 * i / n) for i in range(1, 2 * (n_heads - n) + 1, 2)]
    return np.array(slopes, np.float32)


def alibi_heights(config: Config, positions: Int[Array, "*batch pos"]) -> Float[Array, "*batch head pos"]:
    """Slope times position, in float32; a score gains its key's and loses its query's."""
    slopes, places = alibi_slopes(config.n_heads)[:, None], positions[..., None, :].astype(jnp.float32)
    if config.alibi_dtype == "float32":
        return config.alibi_scale * (jnp.asarray(slopes) * places)
    # Some checkpoints were trained with rounded ones. `astype` there and back could be optimised away.
    rounded = lambda x: lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return config.alibi_scale * rounded(rounded(jnp.asarray(slopes)) * rounded(places))
