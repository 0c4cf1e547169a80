"""Causal attention with explicit heads (Vaswani et al. 2017, arXiv:1706.03762).

Grouped keys: Ainslie et al. 2023, arXiv:2305.13245. Sliding windows: Jiang et al. 2023, arXiv:2310.06825. Soft-caps:
Gemma Team 2024, arXiv:2408.00118. Norms on queries and keys: Dehghani et al. 2023, arXiv:2302.05442.
Sinks: Xiao et al. 2023, arXiv:2309.17453, as gpt-oss learns them: rows of the pattern then sum to less than one.

Scores and softmax are float32 at least, whatever the model's dtype. Scores and pattern of long texts are formed only
where somebody asks for them; otherwise `kernels` mixes the values: by a device's own kernel where there is one for the
case, block by block (`fused`) where there is none.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.models.cache import Keys
from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.fused import fits_one_block
from mechjax.models.kernels.attend import attend
from mechjax.models.marks import Mark, under
from mechjax.models.norms import Norm
from mechjax.models.positions import Sequence, Varying, rotate
from mechjax.models.quantized import Weight, merged
from mechjax.models.scores import mix, scores
from mechjax.transform.context import wanted


class Attention(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    W_Q: Float[Weight, "*layer d_model head d_head"]
    W_K: Float[Weight, "*layer d_model kv_head d_head"]
    W_V: Float[Weight, "*layer d_model kv_head d_head"]
    W_O: Float[Weight, "*layer head d_head d_model"]
    b_Q: Float[Array, "*layer head d_head"] | None
    b_K: Float[Array, "*layer kv_head d_head"] | None
    b_V: Float[Array, "*layer kv_head d_head"] | None
    b_O: Float[Array, "*layer d_model"] | None
    sinks: Float[Array, "*layer head"] | None
    q_norm: Norm | None
    k_norm: Norm | None

    def __call__(
        self,
        read: Float[Array, "*batch pos d_model"],
        normalized: Float[Array, "*batch pos d_model"],
        norm: Norm | None,
        sequence: Sequence,
        varying: Varying,
        config: Config,
        mark: Mark,
        layer: Int[Array, ""] | int = 0,
        cache: Keys | None = None,
    ) -> tuple[Float[Array, "*batch pos d_model"], Keys | None]:
        """What attention gives, from the residual that it reads and that same residual normalised by `norm`.

        With a cache, keys are its slots, and it comes back with this layer's keys and values.
        """
        q, k, v = self._project(read, normalized, norm, config, mark)
        q, k = self._turn(q, k, sequence, varying, config, mark)
        if cache is not None:
            k, v, cache = cache.extend(layer, k, v)
        z = self._attend(q, k, v, sequence, varying, config, mark, self.sinks)
        return self._write(mark(z, "z"), config, mark), cache

    def _project(
        self, read: Array, normalized: Array, norm: Norm | None, config: Config, mark: Mark
    ) -> tuple[Array, Array, Array]:
        """Queries, keys and values, of whatever each head reads."""
        weights = {"q": (self.W_Q, self.b_Q), "k": (self.W_K, self.b_K), "v": (self.W_V, self.b_V)}
        apart = {
            letter: self._split(read, normalized, norm, f"{letter}_input", W.shape[-2], config, mark)
            for letter, (W, _) in weights.items()
            if wanted(f"{letter}_input")
        }

        def project(letter: str) -> Array:
            W, b = weights[letter]
            spec = "...hm,mhd->...hd" if letter in apart else "...m,mhd->...hd"
            y = contract(spec, apart.get(letter, normalized), W, config)
            y = y if b is None else y + b
            clip = config.qkv_clip
            return mark(y if clip is None else jnp.clip(y, -clip, clip), letter)

        return project("q"), project("k"), project("v")

    @staticmethod
    def _split(
        read: Array, normalized: Array, norm: Norm | None, name: str, heads: int, config: Config, mark: Mark
    ) -> Float[Array, "*batch pos head d_model"]:
        """What each head reads, normalised.

        Added as a difference, so that edits of the shared `ln1` sites still reach every head.
        """
        split = mark(jnp.broadcast_to(read[..., None, :], (*read.shape[:-1], heads, read.shape[-1])), name)
        normed = (lambda x: x) if norm is None else (lambda x: norm(x, config))
        return normalized[..., None, :] + (normed(split) - normed(read)[..., None, :])

    def _turn(
        self, q: Array, k: Array, sequence: Sequence, varying: Varying, config: Config, mark: Mark
    ) -> tuple[Array, Array]:
        """Queries and keys, normalised and rotated."""
        over = 2 if config.qk_norm == "joint" else 1
        if self.q_norm is not None and self.k_norm is not None:
            q = self.q_norm(q, config, under(mark, "q_norm"), over)
            k = self.k_norm(k, config, under(mark, "k_norm"), over)
        rotation = varying.rotation(sequence)
        if rotation is None:
            return q, k
        return mark(rotate(q, rotation, config), "rot_q"), mark(rotate(k, rotation, config), "rot_k")

    @staticmethod
    def _attend(
        q: Float[Array, "*batch query head d_head"],
        k: Float[Array, "*batch key kv_head d_head"],
        v: Float[Array, "*batch key kv_head d_value"],
        sequence: Sequence,
        varying: Varying,
        config: Config,
        mark: Mark,
        sinks: Float[Array, " head"] | None = None,
    ) -> Float[Array, "*batch query head d_value"]:
        """Each head's mixture of values, its pattern formed where somebody asks or nothing is saved."""
        asked = {site: wanted(site) for site in ("attn_scores", "pattern")}
        seen = (sequence.queries, sequence.keys, varying.window)
        if not any(asked.values()) and not fits_one_block(q.shape[-3], k.shape[-3]):
            return attend(q, k, v, seen, sinks, config, causal=sequence.causal)
        given = lambda x, site: mark(x, site) if asked[site] else x
        s = given(scores(q, k, *seen, config), "attn_scores")
        if sinks is None:
            pattern = jax.nn.softmax(s, -1)
        else:
            sunk = jnp.broadcast_to(sinks.astype(s.dtype)[:, None, None], (*s.shape[:-1], 1))
            pattern = jax.nn.softmax(jnp.concatenate((s, sunk), -1), -1)[..., :-1]
        return mix(given(pattern.astype(q.dtype), "pattern"), v, config)

    def _write(
        self, z: Float[Array, "*batch pos head d_head"], config: Config, mark: Mark
    ) -> Float[Array, "*batch pos d_model"]:
        """The heads' results, summed."""
        if wanted("result"):
            out = mark(contract("...hd,hdm->...hm", z, self.W_O, config), "result").sum(-2)
        else:
            W = merged(self.W_O)  # or XLA copies it
            out = contract("...i,im->...m", z.reshape(*z.shape[:-2], W.shape[0]), W, config)
        return out if self.b_O is None else out + self.b_O
