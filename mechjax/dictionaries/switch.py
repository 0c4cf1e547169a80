"""Switch dictionaries: a router gives each token to one of several experts, TopK dictionaries of their own.

    p = softmax((x - b_dec) W_router + b_router)        e = the largest of p

    f = p_e ReLU(TopK of the latents of e)        loss = FVU + balance * N sum_e share_e mean p_e

where share_e is the part of the batch's tokens that went to e: the last term is least where experts are used alike. An
expert's latents stand side by side, so `decode` is that of any dictionary.

Cost: encoding takes 2 d F / N operations a token where tokens are sorted by expert (on GPUs and TPUs), and 2 d F on
CPUs, where XLA has no such product; gradients take 8 d k. The authors' code runs all experts. Misleads when: experts
learn the same features again, which they do: count latents that point the same way before widths are compared.

Reference: Mudide, Engels, Michaud, Tegmark and Schroeder de Witt (2024), "Efficient dictionary learning with switch
sparse autoencoders", arXiv:2410.08201. Differs: the router reads what experts read and has a bias for each expert,
instead of a centre of its own.
"""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Key

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.dictionaries.dictionary import Dictionary, Outcome, Selected, Stage, drawn
from mechjax.dictionaries.products import Codes, product, read
from mechjax.dictionaries.top_k import check_k

SORTED = ("gpu", "tpu")  # where one product takes each expert's rows alone


class Switch(Dictionary):
    """A Switch dictionary.

    Attributes:
        W_router: Shape (d_model, expert).
        b_router: Shape (expert,).
        balance: Weight of the term that keeps experts in use.
        k: Latents of a token (static).
    """

    W_router: Float[Array, "*many d_model expert"]
    b_router: Float[Array, "*many expert"]
    balance: Float[Array, "*many"]
    k: int = eqx.field(static=True)

    untrained: ClassVar[tuple[str, ...]] = ("balance",)

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        n_features: int,
        n_experts: int,
        k: int,
        key: Key[Array, ""] | Array,
        balance: float = 3.0,
        d_out: int | None = None,
        skip: bool = False,
        dtype: Any = jnp.float32,
    ) -> "Switch":
        """A fresh dictionary: random unit directions, read and written alike, and for the router.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents of all experts.
            n_experts: How many experts share them.
            k: Latents of a token.
            key: Draws the directions.
            balance: Weight of the term that keeps experts in use; 3 is the paper's.
            d_out: Length of what is written, for a transcoder; None for an autoencoder.
            skip: Whether `x W_skip` is added, for a transcoder.
            dtype: Of all parameters.

        Raises:
            ArgumentError: Sizes that are not positive, latents that experts cannot share evenly, or more latents of a
                token than an expert has.
        """
        latents, router = jax.random.split(key)
        arrays = drawn(d_model, n_features, latents, d_out=d_out, skip=skip, dtype=dtype)
        if n_experts < 1 or n_features % n_experts:
            raise ArgumentError(
                f"n_experts={n_experts} of n_features={n_features}: experts have equally many latents each."
            )
        check_k(k, n_features // n_experts)
        W = jax.random.normal(router, (d_model, n_experts), dtype)
        return cls(
            **arrays, W_router=W / jnp.linalg.norm(W, axis=0), b_router=jnp.zeros(n_experts, dtype),
            balance=jnp.asarray(balance, dtype), k=k,
        )  # fmt: skip

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return self.b_router.shape[-1]

    def routed(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch expert"]:
        """The router's probabilities."""
        seen = x - self.b_dec if self.centred else x
        return jax.nn.softmax(product(seen, self.W_router) + self.b_router)

    def _kept(self, x: Array) -> tuple[Codes, Array, Array]:
        """Pairs that are kept with what the encoder gives there, all that the chosen expert gives, and experts."""
        p = self.routed(x)
        expert, (seen, b) = p.argmax(-1), self.readable(x)
        width = self.n_features // self.n_experts
        W = self.W_enc.reshape(-1, self.n_experts, width).swapaxes(0, 1)
        z = of_experts(seen, W, expert) + b.reshape(self.n_experts, width)[expert]
        values, indices = lax.top_k(z, self.k)
        return Codes(values, indices + (expert[:, None] * width).astype(indices.dtype)), z, expert

    @on_any_mesh
    def encode(self, x: Float[Array, "*batch d_model"]) -> Float[Array, "*batch feature"]:
        """The latents of each token: at most k of one expert are not 0."""
        self.readable(x)
        flat = x.reshape(-1, self.d_model)
        found, _, _ = self._kept(flat)
        f = found.holding(jax.nn.relu(found.values) * self.routed(flat).max(-1, keepdims=True))
        return f.dense(self.n_features).reshape(*x.shape[:-1], -1)

    def select(self, x: Float[Array, "batch d_model"], stage: Stage) -> Selected:
        """The k largest latents of each token's expert, and all of that expert's."""
        found, z, _ = self._kept(x)
        return lax.stop_gradient(Selected(found, z))

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The error, and how unevenly experts are used."""
        found = (self.select(x, stage) if selected is None else selected).codes
        (seen, b), p = self.readable(x), self.routed(x)
        f = jax.nn.relu(read(seen, self.W_enc, b, found)) * p.max(-1, keepdims=True)
        share = (p.argmax(-1)[:, None] == jnp.arange(self.n_experts)).astype(p.dtype).mean(0)
        uneven = self.balance * self.n_experts * (share * p.mean(0)).sum()
        _, outcome = self.outcome(x, y, found.holding(f), {"balance": uneven})
        return outcome.fvu + uneven, outcome

    def scaled(self, read: Any, written: Any) -> "Switch":
        """A dictionary of larger inputs and outputs, routed as before."""
        W = self.W_router / jnp.asarray(read, self.W_router.dtype)
        return eqx.tree_at(lambda d: d.W_router, super().scaled(read, written), W)


def of_experts(
    x: Float[Array, "batch d_model"], W: Float[Array, "expert d_model n"], expert: Int[Array, " batch"]
) -> Float[Array, "batch n"]:
    """Each token times the matrix of its own expert."""
    if jax.default_backend() not in SORTED:
        every = product(x, W.swapaxes(0, 1).reshape(W.shape[1], -1)).reshape(len(x), len(W), -1)
        return jnp.take_along_axis(every, expert[:, None, None], 1)[:, 0]
    order = jnp.argsort(expert)
    sizes = jnp.bincount(expert, length=len(W)).astype(jnp.int32)
    exact = x.dtype == W.dtype == jnp.float32
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    made = lax.ragged_dot(x[order], W, sizes, precision=precision)
    return jnp.zeros_like(made).at[order].set(made)
