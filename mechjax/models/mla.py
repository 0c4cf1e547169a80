"""Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1 and appendix C).

    c_q = norm(x W_DQ),  q = c_q W_Q              (or q = x W_Q)
    c_kv = norm(x W_DKV),  k = [c_kv W_UK, rotated x W_KR],  v = c_kv W_UV

All heads share the part of the key that rotates. The latents after their norms are the sites `q_latent` and
`kv_latent`; `q`, `k` and `v` are whole heads, those dimensions last that rotate.
"""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.models.attention import Attention
from mechjax.models.cache import Keys
from mechjax.models.config import Config
from mechjax.models.contraction import affine, contract, widened
from mechjax.models.latent import Latent
from mechjax.models.marks import Mark
from mechjax.models.norms import Norm
from mechjax.models.positions import Sequence, Varying, rotate
from mechjax.models.quantized import Weight, merged
from mechjax.transform.context import wanted


class MLA(eqx.Module):
    """Weights of one layer, or of all with a leading layer axis; the scales of the latents' norms are `w_q`, `w_kv`."""

    W_DQ: Float[Weight, "*layer d_model q_rank"] | None
    b_DQ: Float[Array, "*layer q_rank"] | None
    w_q: Float[Array, "*layer q_rank"] | None
    W_Q: Float[Weight, "*layer q_read head d_head"]
    W_DKV: Float[Weight, "*layer d_model kv_rank"]
    b_DKV: Float[Array, "*layer kv_rank"] | None
    w_kv: Float[Array, "*layer kv_rank"]
    W_UK: Float[Weight, "*layer kv_rank head d_nope"]
    W_UV: Float[Weight, "*layer kv_rank head d_value"]
    W_KR: Float[Weight, "*layer d_model d_rope"]
    b_KR: Float[Array, "*layer d_rope"] | None
    W_O: Float[Weight, "*layer head d_value d_model"]
    b_O: Float[Array, "*layer d_model"] | None

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

        Raises:
            ArgumentError: A config without latents.
        """
        if (latent := config.latent) is None:
            raise ArgumentError(
                "Latent attention was called, but the config's `latent` is None: pass Latent."
            )

        def split(letter: str) -> Array | None:
            """What each head reads, where somebody asks."""
            if not wanted(name := f"{letter}_input"):
                return None
            return Attention._split(read, normalized, norm, name, config.n_heads, config, mark)

        q = mark(self._queries(normalized, split("q"), latent, config, mark), "q")
        k, v = self._keys_and_values(normalized, split("k"), split("v"), latent, config, mark)
        k, v = mark(k, "k"), mark(v, "v")
        rotation = varying.rotation(sequence)
        if rotation is not None:

            def turn(x: Array) -> Array:
                still, turning = x[..., : latent.d_nope], x[..., latent.d_nope :]
                return jnp.concatenate((still, rotate(turning, rotation, config)), -1)

            q, k = mark(turn(q), "rot_q"), mark(turn(k), "rot_k")
        if cache is not None:
            k, v, cache = cache.extend(layer, k, v)
        z = Attention._attend(q, k, v, sequence, varying, config, mark)
        return self._write(mark(z, "z"), config, mark), cache

    def _queries(
        self, x: Array, split: Array | None, latent: Latent, config: Config, mark: Mark
    ) -> Float[Array, "*batch pos head d_head"]:
        if self.W_DQ is None or self.w_q is None:
            return _up(x if split is None else split, self.W_Q, config, per_head=split is not None)
        W, b, w = self.W_DQ, self.b_DQ, self.w_q
        down = lambda x: _rms(affine(x, W, b, config), w, latent)
        c = _per_head(down, x, split, lambda c: mark(c, "q_latent"))
        return _up(c, self.W_Q, config, per_head=split is not None)

    def _keys_and_values(
        self,
        x: Array,
        split_k: Array | None,
        split_v: Array | None,
        latent: Latent,
        config: Config,
        mark: Mark,
    ) -> tuple[Float[Array, "*batch pos head d_head"], Float[Array, "*batch pos head d_value"]]:
        down = lambda x: _rms(affine(x, self.W_DKV, self.b_DKV, config), self.w_kv, latent)
        c = mark(down(x), "kv_latent")
        of_k, of_v = (_per_head(down, x, split, lambda _: c) for split in (split_k, split_v))
        nope = _up(of_k, self.W_UK, config, per_head=split_k is not None)
        rope = affine(x[..., None, :] if split_k is None else split_k, self.W_KR, self.b_KR, config)
        k = jnp.concatenate((nope, jnp.broadcast_to(rope, (*nope.shape[:-1], latent.d_rope))), -1)
        return k, _up(of_v, self.W_UV, config, per_head=split_v is not None)

    def _write(self, z: Array, config: Config, mark: Mark) -> Float[Array, "*batch pos d_model"]:
        if wanted("result"):
            out = mark(contract("...hd,hdm->...hm", z, self.W_O, config), "result").sum(-2)
        else:
            W = merged(self.W_O)  # or XLA copies it
            out = contract("...i,im->...m", z.reshape(*z.shape[:-2], W.shape[0]), W, config)
        return out if self.b_O is None else out + self.b_O


def _up(c: Array, W: Weight, config: Config, *, per_head: bool) -> Array:
    return contract("...hr,rhd->...hd" if per_head else "...r,rhd->...hd", c, W, config)


def _per_head(
    down: Callable[[Array], Array], x: Array, split: Array | None, name: Callable[[Array], Array]
) -> Array:
    """The latent of what all heads read or, where heads read apart, of what each reads.

    Added as a difference, so that edits of the shared latent still reach every head.
    """
    shared = name(down(x))
    return shared if split is None else shared[..., None, :] + (down(split) - down(x)[..., None, :])


def _rms(x: Array, w: Array, latent: Latent) -> Array:
    """RMSNorm in float32 at least, as the norms of the residual stream."""
    y = widened(x)
    y = y * lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + latent.norm_eps)
    return (y * w.astype(y.dtype)).astype(x.dtype)
