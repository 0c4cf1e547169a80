"""Keys and values of the tokens so far, so that the next ones need not run them again (Pope et al., arXiv:2211.05102).

Slots are allocated once: shapes never change, and a loop updates them in place. Each call takes as many slots as it has
tokens, padding included, in order.
"""

import abc

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.models.config import Config


class Keys(eqx.Module):
    """Whatever brings a layer the keys and values that its queries see."""

    @property
    def start(self) -> int:
        """How many tokens of the text are not run: sites count positions from the text's first."""
        return 0

    @abc.abstractmethod
    def extend(
        self, layer: Int[Array, ""] | int, k: Float[Array, "..."], v: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], "Keys"]:
        """All keys and values of a layer, given those of the tokens that run; and what the next layer gets."""


class Cache(Keys):
    """What attention keeps of the tokens so far. `Cache.empty` makes one, and the model hands on the next.

    Attributes:
        keys: Keys as attention uses them, normalised and rotated. Shape (layer, *batch, slot, kv_head, d_head).
        values: Values. Shape (layer, *batch, slot, kv_head, d_value).
        real: Which slots hold real tokens. Shape (*batch, slot).
        positions: Position of each slot's token. Shape (*batch, slot).
        length: How many slots are taken.
    """

    keys: Float[Array, "layer *batch slot kv_head d_head"]
    values: Float[Array, "layer *batch slot kv_head d_value"]
    real: Bool[Array, "*batch slot"]
    positions: Int[Array, "*batch slot"]
    length: Int[Array, ""]

    @classmethod
    def empty(
        cls, config: Config, batch: int | tuple[int, ...], n_slots: int, dtype: DTypeLike = jnp.float32
    ) -> "Cache":
        """A cache of `n_slots` free slots for each example.

        Args:
            config: The model's.
            batch: The number of examples, or the sizes of the tokens' batch axes (`()` for a single prompt).
            n_slots: How many tokens each example can have.
            dtype: The model's.

        Raises:
            ArgumentError: No slots.
        """
        if n_slots < 1:
            raise ArgumentError(
                f"`n_slots` = {n_slots}: a cache needs one slot for every token that the model will see."
            )
        lead = (batch,) if isinstance(batch, int) else tuple(batch)
        heads, key, value = config.n_kv_heads, config.d_head, config.d_head
        if (latent := config.latent) is not None:
            heads, key, value = config.n_heads, latent.d_nope + latent.d_rope, latent.d_value
        slots = (config.n_layers, *lead, n_slots, heads)
        return cls(
            jnp.zeros((*slots, key), dtype),
            jnp.zeros((*slots, value), dtype),
            jnp.zeros((*lead, n_slots), bool),
            jnp.zeros((*lead, n_slots), jnp.int32),
            jnp.int32(0),
        )

    @property
    def n_slots(self) -> int:
        """How many tokens each example can have."""
        return self.real.shape[-1]

    def admit(
        self,
        n_pos: int,
        mask: Bool[Array, "*batch pos"] | None,
        positions: Int[Array, "*batch pos"] | None,
    ) -> "Cache":
        """The cache that knows where the next `n_pos` tokens stand; `extend` brings their keys and values."""
        shape = (*self.real.shape[:-1], n_pos)
        real = self._put(self.real, jnp.ones(shape, bool) if mask is None else mask)
        if positions is None:
            positions = self.next(_count(real), n_pos)
        placed = self._put(self.positions, jnp.broadcast_to(positions, shape))
        return eqx.tree_at(lambda cache: (cache.real, cache.positions), self, (real, placed))

    def extend(
        self, layer: Int[Array, ""] | int, k: Float[Array, "..."], v: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], "Cache"]:
        """Keys and values of all slots of a layer, with `k` and `v` of the next tokens in theirs."""

        def both(stacked: Array, new: Array) -> tuple[Array, Array]:
            start = (layer, *(0,) * (new.ndim - 3), self.length, 0, 0)
            stacked = lax.dynamic_update_slice(stacked, new[None].astype(stacked.dtype), start)
            return lax.dynamic_index_in_dim(stacked, layer, keepdims=False), stacked

        (k, keys), (v, values) = both(self.keys, k), both(self.values, v)
        return k, v, eqx.tree_at(lambda cache: (cache.keys, cache.values), self, (keys, values))

    def advance(self, n_pos: int) -> "Cache":
        """The cache once the next `n_pos` slots are taken."""
        return eqx.tree_at(lambda cache: cache.length, self, self.length + n_pos)

    @property
    def order(self) -> Int[Array, "*batch slot"]:
        """Index of each slot's token among the real ones of its example."""
        return _count(self.real)

    @property
    def reach(self) -> Int[Array, "*batch"]:
        """How long each example's text is: one more than the last position that it has; 0 before the first token."""
        return jnp.where(self.real, self.positions + 1, 0).max(-1)

    def next(self, slots: Array, n_pos: int) -> Array:
        """What `slots`, of shape (*batch, slot), holds for the next `n_pos` tokens."""
        return lax.dynamic_slice_in_dim(slots, self.length, n_pos, -1)

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuse tokens of another batch, or more than there are free slots, where that can be seen.

        Raises:
            ShapeError: Either.
        """
        if shape[:-1] != self.real.shape[:-1]:
            raise ShapeError(
                f"Tokens of shape {shape} with a cache of {self.real.shape[:-1] or 'one example'}: the batch axes must "
                "be equal. Make the cache with `Cache.empty(config, tokens.shape[:-1], n_slots)`."
            )
        taken = 0 if isinstance(self.length, Tracer) else int(self.length)
        if taken + shape[-1] > self.n_slots:
            raise ShapeError(
                f"{shape[-1]} tokens, but {self.n_slots - taken} of the cache's {self.n_slots} slots are free: make "
                "it with more (`Cache.empty(..., n_slots)`)."
            )

    def before(self, start: int, n_slots: int) -> "Prefix":
        """The tokens before `start` of a text of `n_slots`, whose keys stand; those from there on run again."""
        here = lambda x, n: lax.slice_in_dim(x, 0, n, axis=self.real.ndim - 1)
        keys, values = (lax.slice_in_dim(x, 0, start, axis=x.ndim - 3) for x in (self.keys, self.values))
        real, positions = here(self.real, n_slots), here(self.positions, n_slots)
        return Prefix(keys, values, real, positions, jnp.int32(start))

    def _put(self, slots: Array, new: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(slots, new, self.length, -1)


class Prefix(Cache):
    """Keys and values of the first tokens of a text, to which each layer adds its own of the rest, and keeps nothing.

    `keys` and `values` are of the first tokens; `real` and `positions` of all. `Cache.before` makes one.
    """

    keys: Float[Array, "layer *batch first kv_head d_head"]
    values: Float[Array, "layer *batch first kv_head d_value"]

    @property
    def start(self) -> int:
        """How many tokens are not run again."""
        return self.keys.shape[-3]

    def extend(
        self, layer: Int[Array, ""] | int, k: Float[Array, "..."], v: Float[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float[Array, "..."], "Prefix"]:
        """Keys and values of the whole text."""
        first = lambda x: lax.dynamic_index_in_dim(x, layer, keepdims=False)
        whole = lambda kept, new: jnp.concatenate((first(kept).astype(new.dtype), new), -3)
        return whole(self.keys, k), whole(self.values, v), self


def _count(real: Bool[Array, "*batch slot"]) -> Int[Array, "*batch slot"]:
    return jnp.maximum(jnp.cumsum(real, -1, dtype=jnp.int32) - 1, 0)
