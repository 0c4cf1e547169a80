"""Matryoshka dictionaries: the first latents alone must already make something of the target.

    loss = mean over prefixes m of FVU(f_:m W_dec,:m + b_dec) + aux * AuxK

with latents kept as in `BatchTopK`, over all of them. What is general moves to the early prefixes, and a latent there
is not split by what is special: less absorption.

Reference: Bussmann, Nabeshima, Karvonen and Nanda (2025), arXiv:2503.17547, Eq. 4. Differs from the authors' code,
whose mean also counts a prefix of no latents; weights of prefixes are equal. Prefixes are summed one after another, so
that each costs one more sum of the output's size and not another product of all latents.
"""

from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Key

from mechjax.base.errors import ArgumentError
from mechjax.dictionaries.batch_top_k import BatchTopK, least_of
from mechjax.dictionaries.dictionary import Outcome, Selected, Stage, squared
from mechjax.dictionaries.products import Codes, write


class Matryoshka(BatchTopK):
    """A Matryoshka dictionary.

    Attributes:
        prefixes: Lengths of the prefixes, the last of them all latents (static).
    """

    prefixes: tuple[int, ...] = eqx.field(static=True)

    @classmethod
    def init(
        cls,
        *,
        d_model: int,
        n_features: int,
        k: int,
        key: Key[Array, ""] | Array,
        prefixes: tuple[int, ...] | None = None,
        **more: Any,
    ) -> "Matryoshka":
        """A fresh dictionary.

        Args:
            d_model: Length of what is read.
            n_features: Number of latents.
            k: Latents of a token, on average over a batch.
            key: Draws the directions.
            prefixes: Lengths, rising, the last of them `n_features`; None for 1/16, 1/8, 1/4, 1/2 and all.
            **more: As for `BatchTopK.init`.

        Raises:
            ArgumentError: Prefixes that do not rise to all latents, or what `BatchTopK.init` refuses.
        """
        halves = (n_features // n for n in (16, 8, 4, 2, 1))
        chosen = tuple(dict.fromkeys(n for n in halves if n)) if prefixes is None else tuple(prefixes)
        rising = all(a < b for a, b in zip((0, *chosen), chosen, strict=False))
        if not chosen or not rising or chosen[-1] != n_features:
            raise ArgumentError(
                f"prefixes={chosen}: give lengths that rise, the last of them n_features={n_features}, such as "
                f"({n_features // 4}, {n_features // 2}, {n_features})."
            )
        made = super().init(d_model=d_model, n_features=n_features, k=k, key=key, prefixes=chosen, **more)
        return cast("Matryoshka", made)

    def loss(self, x: Array, y: Array, stage: Stage, selected: Selected | None) -> tuple[Array, Outcome]:
        """The mean error of all prefixes, and AuxK."""
        given, kept = self.kept(x, stage, selected)
        made, errors, start = self.completed(jnp.broadcast_to(self.b_dec, y.shape), x), [], 0
        for end in self.prefixes:
            made = made + write(_within(kept, start, end, self.n_features), self.W_dec)
            errors.append(squared(y - made))
            start = end
        error, outcome = self.measured(y - made, y, kept, {}, least_of(kept))
        spread = jnp.where(outcome.variance > 0, outcome.variance, 1)
        mean = sum(errors[1:], errors[0]) / (len(errors) * spread)
        return self.with_aux(mean, outcome, x, error, given.dense, stage)


def _within(kept: Codes, start: int, end: int, n_features: int) -> Codes:
    """Codes with the latents from `start` to `end` alone."""
    index = jnp.arange(n_features) if kept.indices is None else kept.indices
    return kept.holding(jnp.where((index >= start) & (index < end), kept.values, 0))
