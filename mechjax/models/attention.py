"""Causal attention with explicit heads (Vaswani et al. 2017, arXiv:1706.03762).

Grouped keys: Ainslie et al. 2023, arXiv:2305.13245. Sliding windows: Jiang et al. 2023, arXiv:2310.06825. Soft-caps:
Gemma Team 2024, arXiv:2408.00118.

Scores and softmax are float32 whatever the model's dtype.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mechjax.models.config import Config
from mechjax.models.contraction import contract
from mechjax.models.marks import Mark
from mechjax.models.norms import Norm
from mechjax.models.positions import Sequence, rotate
from mechjax.transform.context import wanted

MASKED = float(jnp.finfo(jnp.float32).min)
"""Score of a key that a query does not see; finite, so that differences and gradients of scores are numbers."""


class Attention(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis."""

    W_Q: Float[Array, "*layer d_model head d_head"]
    W_K: Float[Array, "*layer d_model kv_head d_head"]
    W_V: Float[Array, "*layer d_model kv_head d_head"]
    W_O: Float[Array, "*layer head d_head d_model"]
    b_Q: Float[Array, "*layer head d_head"] | None
    b_K: Float[Array, "*layer kv_head d_head"] | None
    b_V: Float[Array, "*layer kv_head d_head"] | None
    b_O: Float[Array, "*layer d_model"] | None

    def __call__(
        self,
        read: Float[Array, "*batch pos d_model"],
        norm: Norm,
        sequence: Sequence,
        window: Int[Array, ""] | None,
        config: Config,
        mark: Mark,
    ) -> Float[Array, "*batch pos d_model"]:
        """What attention writes, given the residual that it reads."""
        normalized = norm(read, config, lambda x, name: mark(x, f"ln1.{name}"))

        read_by = {
            letter: self._split(read, normalized, norm, f"{letter}_input", heads, config, mark)
            if wanted(f"{letter}_input")
            else normalized
            for letter, heads in (("q", config.n_heads), ("k", config.n_kv_heads), ("v", config.n_kv_heads))
        }

        def project(letter: str, W: Array, b: Array | None) -> Array:
            per_head = read_by[letter] is not normalized
            spec = "...hm,mhd->...hd" if per_head else "...m,mhd->...hd"
            y = contract(spec, read_by[letter], W, config)
            return mark(y if b is None else y + b, letter)

        q = project("q", self.W_Q, self.b_Q)
        k = project("k", self.W_K, self.b_K)
        v = project("v", self.W_V, self.b_V)
        if sequence.rotation is not None:
            q = mark(rotate(q, sequence.rotation, config), "rot_q")
            k = mark(rotate(k, sequence.rotation, config), "rot_k")
        pattern = self._attend(q, k, sequence, window, config, mark)
        z = mark(self._mix(pattern, v, config), "z")
        if wanted("result"):
            out = mark(contract("...hd,hdm->...hm", z, self.W_O, config), "result").sum(-2)
        else:
            W = self.W_O.reshape(config.n_heads * config.d_head, -1)  # merged, or XLA copies it
            out = contract("...i,im->...m", z.reshape(*z.shape[:-2], W.shape[0]), W, config)
        return out if self.b_O is None else out + self.b_O

    @staticmethod
    def _split(
        read: Array, normalized: Array, norm: Norm, name: str, heads: int, config: Config, mark: Mark
    ) -> Float[Array, "*batch pos head d_model"]:
        """What each head reads, normalised.

        Added as a difference, so that edits of the shared `ln1` sites still reach every head.
        """
        split = mark(jnp.broadcast_to(read[..., None, :], (*read.shape[:-1], heads, read.shape[-1])), name)
        return normalized[..., None, :] + (norm(split, config) - norm(read, config)[..., None, :])

    @staticmethod
    def _attend(
        q: Float[Array, "*batch query head d_head"],
        k: Float[Array, "*batch key kv_head d_head"],
        sequence: Sequence,
        window: Int[Array, ""] | None,
        config: Config,
        mark: Mark,
    ) -> Float[Array, "*batch head query key"]:
        groups = (config.n_kv_heads, config.n_heads // config.n_kv_heads)
        grouped = q.reshape(*q.shape[:-2], *groups, config.d_head)
        scores = contract("...qngd,...knd->...ngqk", grouped, k, config, jnp.float32) * config.attn_scale
        scores = scores.reshape(*scores.shape[:-4], config.n_heads, *scores.shape[-2:])
        if config.attn_softcap is not None:
            scores = config.attn_softcap * jnp.tanh(scores / config.attn_softcap)
        visible = sequence.visible
        if window is not None and sequence.distance is not None:
            visible = visible & (sequence.distance < window)
        scores = mark(jnp.where(visible[..., None, :, :], scores, MASKED), "attn_scores")
        return mark(jax.nn.softmax(scores, -1).astype(q.dtype), "pattern")

    @staticmethod
    def _mix(
        pattern: Float[Array, "*batch head query key"],
        v: Float[Array, "*batch key kv_head d_head"],
        config: Config,
    ) -> Float[Array, "*batch query head d_head"]:
        groups = (config.n_kv_heads, config.n_heads // config.n_kv_heads)
        grouped = pattern.reshape(*pattern.shape[:-3], *groups, *pattern.shape[-2:])
        z = contract("...ngqk,...knd->...qngd", grouped, v, config)
        return z.reshape(*z.shape[:-3], config.n_heads, config.d_head)
