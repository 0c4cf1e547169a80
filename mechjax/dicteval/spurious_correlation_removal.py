"""Can a spurious attribute be taken out of a probe by ablating the latents that stand for it?

Rows have two attributes. A biased probe is fitted to rows in which they agree, so it cannot tell them apart; probes of
either attribute are fitted to rows of all four kinds. Latents are ordered by their effect on the unwanted attribute's
probe w,

    effect[j] = |(mean f_j where it is true - mean f_j where it is not) (W_dec[j] . w)|

and the n of largest effect are set to 0 in test rows, what the dictionary misses kept. With accuracies of the biased
probe on the wanted attribute, before and after, and of that attribute's own probe (the oracle),

    score = (after - before) / (oracle - before)

Both directions are measured: the spurious attribute removed and the labels judged, and the other way round. The four
kinds of rows count the same, in means, in fits and in accuracies.

Reference: Karvonen, Rager, Marks and Nanda (2024), arXiv:2411.18895, after SHIFT (Marks et al. 2024, arXiv:2403.19647,
section 4); SAEBench (2025), arXiv:2503.09532, and its code at 0.6.0. Differs: where the oracle is no better than the
biased probe by 0.001 the score is undefined (NaN), where SAEBench says 0; where the biased probe is as bad in both
directions `score` is their mean, where SAEBench has none; rows are weighted instead of drawn; probes are logistic
regressions at their optimum (give others as `probes`).
Cost: an encoding, the fits, and rows x latents for each direction and n; no edited row is formed.
Exact when: always: dictionaries write linearly.
Misleads when: the oracle is hardly better than the biased probe, so that little is divided by little.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.dicteval.ablated import check_probes, numbers, reads, removed
from mechjax.dicteval.classified import accuracy
from mechjax.dicteval.labelled import (
    Autoencoder,
    HeldOut,
    Labelled,
    Labels,
    decoder,
    labelled,
    mean_difference,
)
from mechjax.fit.logistic import Logistic, optimum

KINDS = ("neither", "`spurious` alone", "`labels` alone", "both")
LEAST = 1e-3
"""Difference of accuracies below which there is nothing to win."""


class SpuriousCorrelationRemoval(Record):
    """How much of what a biased probe gets wrong is put right by ablating latents.

    Attributes:
        score: For each number of latents, of the direction in which the biased probe is worse.
        by_direction: Of both.
        after: Accuracy of the biased probe on the wanted attribute, after ablation.
        before: Before.
        oracle: Of the wanted attribute's own probe.
        latents: For each direction the latents that are ablated, that of the largest effect first.
        effects: Their effects; those of 0 are not ablated.
        probes: Of the labels, of the spurious attribute, and the biased one.
        n: How many latents were ablated (static).
    """

    score: Float[Array, "n"]
    by_direction: Float[Array, "direction n"]
    after: Float[Array, "direction n"]
    before: Float[Array, "direction"]
    oracle: Float[Array, "direction"]
    latents: Int[Array, "direction rank"]
    effects: Float[Array, "direction rank"]
    probes: Logistic
    n: tuple[int, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Numbers of latents, and what is removed."""
        return {"n": tuple(f"n={n}" for n in self.n), "direction": ("without spurious", "without labels")}


@on_any_mesh
def spurious_correlation_removal(
    dictionary: Autoencoder,
    x: Float[Array | np.ndarray, "row *pos d_model"],
    labels: Labels,
    spurious: Labels,
    *,
    n: Sequence[int] | None = None,
    test: HeldOut = 0.25,
    mask: Bool[Array | np.ndarray, "row pos"] | None = None,
    probes: Logistic | None = None,
    l2: float = 1.0,
) -> SpuriousCorrelationRemoval:
    """Ablate the latents of one attribute, and measure a probe that was fitted where both agree.

    Args:
        dictionary: An autoencoder of one site.
        x: Activations of tokens (row, d_model), or of texts (row, pos, d_model): then means over tokens are probed.
        labels: The wanted attribute: true or false, or 1 or 0, for each row.
        spurious: The other one.
        n: How many latents are ablated; None for those of 2, 5, 10, 20, 50, 100 and 500 that there are.
        test: Which rows are held out, or what part: the last rows of each of the four kinds.
        mask: Of texts, which tokens are real.
        probes: Of the labels, of the spurious attribute, and the biased one; None to fit them to train rows.
        l2: Penalty of those fits, on half the squared weights for all rows together.

    Raises:
        ShapeError: Arrays that do not fit each other or the dictionary.
        ArgumentError: Attributes that are not binary, a kind of rows that is missing or has no train or test rows, more
            latents than there are, or NaN.
    """
    counts = numbers(n, dictionary.n_features)
    if l2 <= 0:
        raise ArgumentError(
            f"l2={l2}: the penalty must be above 0, or rows that can be separated have no optimum."
        )
    both = [np.asarray(attribute) for attribute in (labels, spurious)]
    if both[0].shape != both[1].shape or both[0].ndim != 1:
        raise ShapeError(
            f"labels have shape {both[0].shape}, spurious {both[1].shape}: give one of each for each row."
        )
    if any(a.dtype.kind not in "iub" or not np.isin(a, (0, 1)).all() for a in both):
        raise ArgumentError(
            "labels and spurious must be true or false, or 1 or 0, for each row: both are binary."
        )
    kind = 2 * both[0].astype(np.int32) + both[1].astype(np.int32)
    missing = [name for i, name in enumerate(KINDS) if not (kind == i).any()]
    if missing:
        raise ArgumentError(
            f"no row has {' and no row '.join(missing)}: rows of all four kinds are needed to tell the "
            "attributes apart."
        )
    rows = labelled(dictionary, x, kind, test=test, mask=mask, written=True, spelled=KINDS)
    check_probes(probes, 3, rows.x.shape[1], "the labels, the spurious attribute, and the biased one")
    measured = _removal(
        rows,
        decoder(dictionary),
        probes,
        jnp.asarray(counts, jnp.int32),
        max(counts),
        jnp.asarray(l2, rows.x.dtype),
    )
    return SpuriousCorrelationRemoval(**measured, n=counts)


@eqx.filter_jit
def _removal(
    rows: Labelled, W_dec: Array, probes: Logistic | None, n: Array, most: int, l2: Array
) -> dict[str, Any]:
    """The record's fields."""
    attributes = jnp.stack([rows.label // 2, rows.label % 2]) == 1
    every, agreeing = jnp.arange(4) >= 0, (jnp.arange(4) % 3) == 0
    fitted, biased = _alike(rows, rows.train, every), _alike(rows, rows.train, agreeing)
    held_out = _alike(rows, ~rows.train, every)
    if probes is None:
        y = jnp.concatenate([attributes, attributes[:1]])
        weights = jnp.stack([fitted, fitted, biased])
        probes = jax.vmap(lambda *given: optimum(rows.x, *given, l2=l2))(y, weights)
    of_rows = probes.margins(rows.x)
    read = reads(W_dec, probes.weight)
    effects = jnp.abs(mean_difference(rows.f, attributes, jnp.stack([fitted, fitted])) * read[:, :2].T)[::-1]
    before, oracle = accuracy(of_rows[2], attributes, held_out), accuracy(of_rows[:2], attributes, held_out)
    gone = lax.map(lambda own: removed(rows.f, read[:, 2:], own, n)[:, 0], effects)  # (direction, n, row)
    after = accuracy(of_rows[2] - gone, attributes[:, None], held_out)
    room = (oracle - before)[:, None]
    scores = jnp.where(room < LEAST, jnp.nan, (after - before[:, None]) / jnp.where(room < LEAST, 1, room))
    worse = jnp.where(before[0] < before[1], scores[0], scores[1])
    score = jnp.where(before[0] == before[1], jnp.nanmean(scores, 0), worse)
    best, latents = lax.top_k(effects, most)
    return {
        "score": score, "by_direction": scores, "after": after, "before": before, "oracle": oracle,
        "latents": latents, "effects": best, "probes": probes,
    }  # fmt: skip


def _alike(rows: Labelled, part: Array, kinds: Array) -> Float[Array, " row"]:
    """What rows of a part count: the same for each of some kinds, in all as much as there are rows of these."""
    counts = jnp.zeros(4, rows.x.dtype).at[rows.label].add(part.astype(rows.x.dtype))
    counts = jnp.where(kinds, counts, 0)
    share = counts.sum() / (kinds.sum().astype(counts.dtype) * jnp.maximum(counts, 1))
    return jnp.where(part & kinds[rows.label], share[rows.label], 0)
