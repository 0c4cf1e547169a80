"""Tokens sorted by expert, so that each expert multiplies its own tokens and no other.

Every expert's tokens are padded to whole blocks (Gale et al. 2022, MegaBlocks, arXiv:2211.15841), and a scan over
blocks multiplies each by the weights of its expert. Exact: no token is dropped. FLOPs grow with `top_k`, not with the
number of experts, and weights of experts that no token goes to are never read. Shapes are static: the number of blocks
is the most that any routing needs.

`jax.lax.ragged_dot` would say the same in one primitive. Not used: on CPU it multiplies every token by every expert,
and it cannot be mapped while the weights are shared, which every sweep does (jax 0.10).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.quantized import Weight

_LEAST, _MOST = 8, 128  # rows of a block: enough to use a matrix unit, few enough to pad little


class Dispatch(eqx.Module):
    """Where each token goes.

    Attributes:
        slot: Row at which each choice of each token is computed. Shape (token, choice).
        token: Which token each row holds; the number of tokens for rows that hold none. Shape (block, row).
        expert: Whose weights each block is multiplied by. Shape (block,).
    """

    slot: Int[Array, "token choice"]
    token: Int[Array, "block row"]
    expert: Int[Array, " block"]

    def send(self, x: Float[Array, "token d"]) -> Float[Array, "block row d"]:
        """Tokens in the rows where they are computed; zeros in rows that hold none."""
        return x.at[self.token].get(mode="fill", fill_value=0)

    def multiply(
        self,
        x: Float[Array, "block row d_in"],
        W: Float[Weight, "expert d_in d_out"],
        b: Float[Array, "expert d_out"] | None,
        config: Config,
    ) -> Float[Array, "block row d_out"]:
        """Each block by its expert's weights, plus its bias."""

        def one(block: tuple[Array, Array]) -> Array:
            rows, expert = block
            own, bias = jax.tree.map(
                lambda leaf: lax.dynamic_index_in_dim(leaf, expert, keepdims=False), (W, b)
            )
            y = contract("ri,io->ro", rows, own, config)
            return y if bias is None else y + bias

        return lax.map(one, (x, self.expert))

    def collect(self, x: Float[Array, "block row d"]) -> Float[Array, "token choice d"]:
        """What each of a token's experts made of it."""
        return x.reshape(-1, x.shape[-1])[self.slot]


def dispatch(indices: Int[Array, "token choice"], n_experts: int) -> Dispatch:
    """Rows for every choice of every token, sorted by expert; indices must be from 0 to `n_experts` - 1."""
    n_tokens, top_k = indices.shape
    n = n_tokens * top_k
    rows = min(max(1 << (n // n_experts).bit_length(), _LEAST), _MOST)
    n_blocks = (
        n + min(n_experts, n) * (rows - 1)
    ) // rows  # every expert that is chosen may pad all rows but one

    ids = indices.reshape(-1)
    count = jnp.zeros(n_experts, jnp.int32).at[ids].add(1)
    padded = -(-count // rows) * rows
    order = jnp.argsort(ids, stable=True)
    total = lambda x: jnp.cumsum(x, dtype=jnp.int32)
    place = (total(padded) - padded) - (total(count) - count)  # rows of padding before each expert
    slot = jnp.zeros(n, jnp.int32).at[order].set(jnp.arange(n, dtype=jnp.int32) + place[ids[order]])
    token = jnp.full(n_blocks * rows, n_tokens, jnp.int32)
    token = token.at[slot].set(jnp.arange(n, dtype=jnp.int32) // top_k)
    last = total(padded) // rows
    expert = jnp.searchsorted(last, jnp.arange(n_blocks, dtype=jnp.int32), side="right").clip(
        max=n_experts - 1
    )
    return Dispatch(slot.reshape(n_tokens, top_k), token.reshape(n_blocks, rows), expert.astype(jnp.int32))
