"""T5's attention: scores as they are, plus a learned bias for each distance (Raffel et al. 2019, section 2.1).

    score[q, k] = <query[q], key[k]> + bias[bucket(position[k] - position[q])]

Distances share biases, the more the further they are. In an encoder a bucket says before or after as well; in a
decoder nothing after is seen. The scores are not divided by `sqrt(d_head)`. Attention from one text to another (cross)
has no bias.

Scores and softmax are float32 at least, whatever the model's dtype. They are always formed: memory grows with the
product of the two lengths.
"""

import math
from dataclasses import dataclass
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mechjax.models.contraction import contract
from mechjax.models.marks import Mark
from mechjax.models.norms import Norm
from mechjax.models.quantized import Weight, merged
from mechjax.models.scores import MASKED
from mechjax.models.t5_config import T5Config
from mechjax.transform.context import wanted


@dataclass(frozen=True)
class Names:
    """Names the activations of one attention: "z" is the site `prefix + "z"`."""

    mark: Mark
    prefix: str = ""

    def __call__(self, x: Float[Array, "..."], name: str) -> Float[Array, "..."]:
        """Names an activation; the identity."""
        return self.mark(x, self.prefix + name)

    def asked(self, name: str) -> bool:
        """Whether somebody asks for what is formed on request."""
        return wanted(self.prefix + name)


class T5Attention(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    W_Q: Float[Weight, "*layer d_model head d_head"]
    W_K: Float[Weight, "*layer d_model head d_head"]
    W_V: Float[Weight, "*layer d_model head d_head"]
    W_O: Float[Weight, "*layer head d_head d_model"]

    def project(
        self,
        letters: str,
        read: Float[Array, "*batch pos d_model"],
        normalized: Float[Array, "*batch pos d_model"],
        norm: Norm | None,
        config: T5Config,
        names: Names,
    ) -> list[Float[Array, "*batch pos head d_head"]]:
        """Queries, keys, values ("q", "k", "v"): those of `letters`, of what each head reads.

        `normalized` is what `norm` makes of `read`; without a norm, heads are not told apart.
        """
        weights = {"q": self.W_Q, "k": self.W_K, "v": self.W_V}
        apart = {
            letter: _split(read, normalized, norm, f"{letter}_input", config, names)
            for letter in letters
            if norm is not None and names.asked(f"{letter}_input")
        }

        def project(letter: str) -> Array:
            spec = "...hm,mhd->...hd" if letter in apart else "...m,mhd->...hd"
            return names(contract(spec, apart.get(letter, normalized), weights[letter], config), letter)

        return [project(letter) for letter in letters]

    def mix(
        self,
        q: Float[Array, "*batch query head d_head"],
        k: Float[Array, "*batch key head d_head"],
        v: Float[Array, "*batch key head d_head"],
        bias: Float[Array, "... head query key"] | None,
        seen: Bool[Array, "... #query key"] | None,
        config: T5Config,
        names: Names,
    ) -> Float[Array, "*batch pos d_model"]:
        """What attention writes; `seen` says which key each query sees, None that it sees all."""
        wide = q.dtype if jnp.finfo(q.dtype).bits > 32 else jnp.float32
        scores = contract("...qhd,...khd->...hqk", q, k, config, wide)
        if bias is not None and names.asked("pos_bias"):
            bias = names(jnp.broadcast_to(bias, scores.shape), "pos_bias")
        if bias is not None:
            scores = scores + bias.astype(wide)
        if seen is not None:
            scores = jnp.where(seen[..., None, :, :], scores, MASKED)
        given = lambda x, site: names(x, site) if names.asked(site) else x
        pattern = jax.nn.softmax(given(scores, "attn_scores"), -1).astype(q.dtype)
        z = names(contract("...hqk,...khd->...qhd", given(pattern, "pattern"), v, config), "z")
        if names.asked("result"):
            return names(contract("...hd,hdm->...hm", z, self.W_O, config), "result").sum(-2)
        W = merged(self.W_O)  # or XLA copies it
        return contract("...i,im->...m", z.reshape(*z.shape[:-2], W.shape[0]), W, config)


def _split(
    read: Array, normalized: Array, norm: Norm, name: str, config: T5Config, names: Names
) -> Float[Array, "*batch pos head d_model"]:
    """What each head reads, normalised.

    Added as a difference, so that edits of the shared norm's sites still reach every head.
    """
    shape = (*read.shape[:-1], config.n_heads, read.shape[-1])
    split = names(jnp.broadcast_to(read[..., None, :], shape), name)
    return normalized[..., None, :] + (norm(split, config) - norm(read, config)[..., None, :])


def biases(
    W_rel: Float[Array, "bucket head"],
    queries: Int[Array, "... query"],
    keys: Int[Array, "... key"],
    config: T5Config,
    *,
    both_ways: bool,
) -> Float[Array, "... head query key"]:
    """What each score gains by the positions of its query and its key.

    Args:
        W_rel: Bias of each bucket and head.
        queries: Positions of the queries.
        keys: Positions of the keys.
        config: The model's.
        both_ways: Whether keys after a query are told from those before it, as in an encoder.
    """
    table = jnp.asarray(_buckets(config.n_buckets, config.max_distance, both_ways))
    after = keys[..., None, :] - queries[..., :, None]
    distance = jnp.abs(after) if both_ways else jnp.maximum(-after, 0)
    bucket = table[jnp.minimum(distance, config.max_distance)]
    if both_ways:
        bucket = bucket + jnp.where(after > 0, config.n_buckets // 2, 0)
    return jnp.moveaxis(W_rel[bucket], -1, -3)


@cache
def _buckets(n_buckets: int, max_distance: int, both_ways: bool) -> Int[np.ndarray, " distance"]:
    """Bucket of each distance up to the furthest that has its own, in one direction.

    The first half hold one distance each, the others grow in powers. Rounded as float32, which the models were trained
    with: where a power falls on a whole distance, that decides.
    """
    n = n_buckets // 2 if both_ways else n_buckets
    single = n // 2
    distance = np.arange(max_distance + 1)
    powers = np.log(np.maximum(distance, single).astype(np.float32) / np.float32(single))
    powers = powers / np.float32(math.log(max_distance / single)) * np.float32(n - single)
    shared = np.minimum(single + powers.astype(np.int32), n - 1)
    return np.where(distance < single, distance, shared).astype(np.int32)
