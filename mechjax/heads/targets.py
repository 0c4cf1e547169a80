"""Where a known kind of head looks: keys for every query, from the tokens alone. Padding is nobody's target."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from mechjax.models.decoder import Decoder, Tokens, as_tokens

Ids = Int[Array, "*batch pos"]
Mask = Bool[Array, "*batch pos"]


def read_tokens(model: Decoder, prompts: Tokens) -> tuple[Ids, Mask]:
    """Ids, and True for the real ones."""
    tokens, mask = as_tokens(prompts, None, model.config)
    return tokens, jnp.ones(tokens.shape, bool) if mask is None else mask


def to_previous(tokens: Ids, mask: Mask) -> Bool[Array, "*batch query key"]:
    """The real token just before."""
    order = jnp.cumsum(mask, -1)
    return _real(mask) & (order[..., None, :] == order[..., :, None] - 1)


def to_duplicates(tokens: Ids, mask: Mask) -> Bool[Array, "*batch query key"]:
    """Earlier copies of the query's token."""
    return _real(mask) & _earlier(tokens) & (tokens[..., None, :] == tokens[..., :, None])


def after_duplicates(tokens: Ids, mask: Mask) -> Bool[Array, "*batch query key"]:
    """Tokens just after an earlier copy of the query's token: the query itself, where the copy is just before it."""
    before, has = _before(tokens, mask)
    copied = has[..., None, :] & (before[..., None, :] == tokens[..., :, None])
    return _real(mask) & (_earlier(tokens) | jnp.eye(tokens.shape[-1], dtype=bool)) & copied


def _real(mask: Mask) -> Bool[Array, "*batch query key"]:
    return mask[..., :, None] & mask[..., None, :]


def _earlier(tokens: Ids) -> Bool[Array, "query key"]:
    return jnp.tri(tokens.shape[-1], k=-1, dtype=bool)


def _before(tokens: Ids, mask: Mask) -> tuple[Ids, Mask]:
    """The real token before each, and whether there is one."""
    last = lax.cummax(jnp.where(mask, jnp.arange(tokens.shape[-1]), -1), axis=tokens.ndim - 1)
    last = jnp.concatenate([jnp.full_like(last[..., :1], -1), last[..., :-1]], -1)
    return jnp.take_along_axis(tokens, jnp.maximum(last, 0), -1), last >= 0
