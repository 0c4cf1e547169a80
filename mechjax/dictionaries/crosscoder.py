"""Crosscoders: one set of latents for several sites at once, of several layers or of several models.

    f = kept(sum_s a_s W_enc,s + b_enc)        a_hat_s = f W_dec,s + b_dec,s

    loss = sum_s ||a_s - a_hat_s||^2 + coefficient * sum_i f_i sum_s ||W_dec,i,s||

A crosscoder is a dictionary that reads its sites side by side, so every kind can be one: the loss above is a ReLU
dictionary's, with rows of the decoder measured site by site (`Joint`). With lengths of whole rows (`ReLU`) a latent of
all sites would cost less than the same latents apart; `BatchTopK` has no such penalty. Where `relative_norms` are to
say what two models do not share, that matters: the penalty makes latents of one model alone that both have.

Cost: that of a dictionary of `n_sites * d_model` numbers. Misleads when: sites differ in size (train on
`mechjax.dictlearn.train`, which measures each by itself), or when a latent of one site alone is taken for a difference
(Minder et al.).

Reference: Lindsey, Templeton, Marcus, Conerly, Batson and Olah (2024), "Sparse crosscoders for cross-layer features and
model diffing"; with BatchTopK: Minder, Dumas, Juang, Chughtai and Nanda (2025), arXiv:2504.02922.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.batch_top_k import BatchTopK
from mechjax.dictionaries.dictionary import Dictionary
from mechjax.dictionaries.gated import Gated
from mechjax.dictionaries.jump_relu import JumpReLU
from mechjax.dictionaries.relu import ReLU
from mechjax.dictionaries.top_k import TopK

KINDS = (ReLU, Gated, TopK, BatchTopK, JumpReLU)


class Joint(ReLU):
    """A ReLU dictionary of sites side by side, whose penalty counts the lengths of a row at each of them.

    Attributes:
        n_sites: How many there are (static).
    """

    n_sites: int = eqx.field(static=True, default=1)

    def decoder_norms(self) -> Float[Array, "*many feature"]:
        """The sum over sites of the lengths of each latent's rows."""
        apart = self.W_dec.reshape(*self.W_dec.shape[:-1], self.n_sites, -1)
        return jnp.linalg.norm(apart, axis=-1).sum(-1)


class Crosscoder(eqx.Module):
    """A crosscoder.

    Attributes:
        dictionary: Of the sites side by side.
        n_sites: How many there are (static).
    """

    dictionary: Dictionary
    n_sites: int = eqx.field(static=True)

    @property
    def trained(self) -> Dictionary:
        """What training changes: the dictionary of the sites side by side."""
        return self.dictionary

    def with_trained(self, trained: Dictionary) -> "Crosscoder":
        """A crosscoder of what was trained."""
        return Crosscoder(trained, self.n_sites)

    @staticmethod
    def init(
        *,
        n_sites: int,
        d_model: int,
        n_features: int,
        key: Key[Array, ""] | Array,
        kind: type[Dictionary] | None = None,
        **more: Any,
    ) -> "Crosscoder":
        """A fresh crosscoder.

        Args:
            n_sites: How many sites are read and made.
            d_model: Length of what is read at each.
            n_features: Number of latents.
            key: Draws the directions.
            kind: What is kept of latents and what the loss is, such as `BatchTopK`; None for ReLU and the loss above.
            **more: As for `kind.init`: `k`, `coefficient`, `dtype`.

        Raises:
            ArgumentError: Sizes that are not positive, and what `kind.init` refuses.
        """
        if n_sites < 1 or d_model < 1:
            raise ArgumentError(f"n_sites={n_sites}, d_model={d_model}: each size must be 1 or more.")
        if {"d_out", "skip"} & more.keys():
            raise ArgumentError("a crosscoder makes what it reads: leave `d_out` and `skip` out.")
        sizes: dict[str, Any] = {"d_model": n_sites * d_model, "n_features": n_features, "key": key}
        if kind is not None and not issubclass(kind, KINDS):
            known = ", ".join(of.__name__ for of in KINDS)
            raise ArgumentError(
                f"kind={kind.__name__}: sites can be measured each by itself only where one encoder reads them; a "
                f"crosscoder can be made of {known}, and of what is made of these."
            )
        if kind is not None:
            return Crosscoder(kind.init(**sizes, **more), n_sites)
        made = ReLU.init(**sizes, **more)
        if made.penalty != "weighted":
            raise ArgumentError(
                "penalty='l1' has rows of length 1; a crosscoder weights latents by their rows."
            )
        names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "centred", "coefficient", "penalty")
        return Crosscoder(Joint(**{name: getattr(made, name) for name in names}, n_sites=n_sites), n_sites)

    @property
    def n_features(self) -> int:
        """Number of latents."""
        return self.dictionary.n_features

    @property
    def d_model(self) -> int:
        """Length of what is read at each site."""
        return self.dictionary.d_model // self.n_sites

    @property
    def reads(self) -> tuple[int, ...]:
        """The shape of what is read of a token."""
        return (self.n_sites, self.d_model)

    @property
    def writes(self) -> tuple[int, ...]:
        """The shape of what is made of a token."""
        return self.reads

    @property
    def W_enc(self) -> Float[Array, "*many site d_model feature"]:
        """The encoders."""
        W = self.dictionary.W_enc
        return W.reshape(*W.shape[:-2], self.n_sites, -1, W.shape[-1])

    @property
    def W_dec(self) -> Float[Array, "*many feature site d_model"]:
        """The decoders."""
        return self._apart(self.dictionary.W_dec)

    @property
    def b_dec(self) -> Float[Array, "*many site d_model"]:
        """The decoders' biases."""
        return self._apart(self.dictionary.b_dec)

    def _apart(self, x: Array) -> Array:
        return x.reshape(*x.shape[:-1], self.n_sites, -1)

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch site d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token.

        Raises:
            ShapeError: Other sites, or another length.
        """
        if x.shape[-2:] != self.reads:
            raise ShapeError(
                f"the input has shape {x.shape}, and this crosscoder reads {self.n_sites} sites of length "
                f"{self.d_model}: stack them along the axis before the last."
            )
        return self.dictionary.encode(x.reshape(*x.shape[:-2], -1))

    @on_any_mesh
    def decode(self, f: Float[Array, "*batch feature"]) -> Float[Array, "*batch site d_model"]:
        """What latents stand for at each site."""
        return self._apart(self.dictionary.decode(f))

    @on_any_mesh
    def __call__(self, x: Float[Array, "*batch site d_model"]) -> Float[Array, "*batch site d_model"]:
        """What is made of `x`."""
        return self.decode(self.encode(x))

    def decoder_norms(self) -> Float[Array, "*many feature site"]:
        """Length of each latent's row of the decoder at each site."""
        return jnp.linalg.norm(self.W_dec, axis=-1)

    def relative_norms(
        self, one: int, other: int, *, scale: Float[Array, " site"] | None = None
    ) -> Float[Array, "*many feature"]:
        """Of each latent's rows at two sites the share of `other`: 0 where `one` alone has it, 1/2 where both do.

        Args:
            one: A site.
            other: Another.
            scale: What rows are divided by first, for sites that differ in size: `training.scale[1]`, which gives the
                rows back that training saw.

        Returns:
            `||W_dec,other|| / (||W_dec,one|| + ||W_dec,other||)`; 1/2 where both are 0.

        Raises:
            ArgumentError: A site that is not there.
        """
        for site in (one, other):
            if not -self.n_sites <= site < self.n_sites:
                raise ArgumentError(f"site {site}: this crosscoder has the sites 0 to {self.n_sites - 1}.")
        norms = self.decoder_norms()
        norms = norms if scale is None else norms / scale.astype(norms.dtype)
        a, b = norms[..., one], norms[..., other]
        return jnp.where(a + b > 0, b / jnp.where(a + b > 0, a + b, 1), 0.5)

    def scaled(
        self, read: Float[Array, "*site"] | float, written: Float[Array, "*site"] | float
    ) -> "Crosscoder":
        """A crosscoder of larger inputs and outputs, each site by its own factor, whose latents are the mean of these.

        Exact: `c.scaled(s, s)(s * x) == s * c(x)`, with `s` of shape (site, 1) on the right. A crosscoder makes what it
        reads, so `read` is `written`. Where factors differ, rows of the decoder that had length 1 have it no more; to
        go on with training, go back to the units of training first: `scaled(1 / s, 1 / s)`.
        """
        sizes = [jnp.broadcast_to(jnp.asarray(by, self.b_dec.dtype), self.n_sites) for by in (read, written)]
        (at_read, all_read), (at_written, all_written) = ((by / by.mean(), by.mean()) for by in sizes)
        even = self.dictionary.scaled(all_read, all_written)
        wide = lambda by: jnp.repeat(by, self.d_model)
        made = [
            even.W_enc / wide(at_read)[:, None],
            even.W_dec * wide(at_written),
            even.b_dec * wide(at_written),
        ]
        return Crosscoder(eqx.tree_at(lambda d: [d.W_enc, d.W_dec, d.b_dec], even, made), self.n_sites)
