"""Are a class's latents its own? Ablate those that its probe reads, and see which probes are perturbed.

For each class i, with its probe w_i of activations and latents ordered by their effect,

    effect_i[j] = max(0, mean f_j of class i - mean f_j of the rest) (W_dec[j] . w_i)

the n of largest effect are set to 0 in test rows, what the dictionary misses kept. With A_j the accuracy of class j's
probe before and A_ij after,

    score = mean over i of [(A_i - A_ii) - mean over j != i of (A_j - A_ij)]

The rest counts as much as the class, and each label in it as much as any other, in means, in fits and in accuracies.

Reference: Karvonen, Rager, Marks and Nanda (2024), "Evaluating sparse autoencoders on targeted concept erasure tasks",
arXiv:2411.18895; SAEBench (2025), arXiv:2503.09532, and its code at 0.6.0. Differs: rows of the rest are weighted,
where SAEBench draws some anew for each accuracy; latents without a positive effect are left alone, where SAEBench goes
on with such as are more active in the rest, once those of positive effect are used up; probes are logistic regressions
at their optimum (`l2`), where SAEBench takes the epoch that is best on test rows (give others as `probes`).
Cost: an encoding, the fits, and rows x latents x probes for each class and n; no edited row is formed.
Exact when: always: dictionaries write linearly.
Misleads when: there are two labels, whose probes are each other's opposite; or scores of other n are compared.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
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
    even,
    labelled,
    mean_difference,
)
from mechjax.fit.logistic import Logistic, optimum


class TargetedProbePerturbation(Record):
    """How much more a class's ablation perturbs its own probe than others'.

    Attributes:
        score: For each number of latents, mean over classes: `intended` less `unintended`.
        intended: Mean drop of the ablated class's accuracy.
        unintended: Mean drop of others'.
        by_class: The score of each class's ablation.
        accuracy: Of each class's probe after each class's ablation.
        clean: Of each class's probe before.
        latents: For each class its latents, that of the largest effect first.
        effects: Their effects; those that are not positive are not ablated.
        probes: The probes.
        n: How many latents were ablated (static).
        classes: The classes (static).
    """

    score: Float[Array, "n"]
    intended: Float[Array, "n"]
    unintended: Float[Array, "n"]
    by_class: Float[Array, "n ablated"]
    accuracy: Float[Array, "n ablated class"]
    clean: Float[Array, "class"]
    latents: Int[Array, "class rank"]
    effects: Float[Array, "class rank"]
    probes: Logistic
    n: tuple[int, ...] = eqx.field(static=True)
    classes: tuple[int, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Numbers of latents, and classes."""
        names = tuple(f"class {c}" for c in self.classes)
        return {"n": tuple(f"n={n}" for n in self.n), "class": names, "ablated": names}


@on_any_mesh
def targeted_probe_perturbation(
    dictionary: Autoencoder,
    x: Float[Array | np.ndarray, "row *pos d_model"],
    labels: Labels,
    *,
    n: Sequence[int] | None = None,
    test: HeldOut = 0.25,
    mask: Bool[Array | np.ndarray, "row pos"] | None = None,
    probes: Logistic | None = None,
    l2: float = 1.0,
) -> TargetedProbePerturbation:
    """Ablate each class's latents, and measure all classes' probes.

    Args:
        dictionary: An autoencoder of one site.
        x: Activations of tokens (row, d_model), or of texts (row, pos, d_model): then means over tokens are probed.
        labels: One integer or truth value for each row.
        n: How many latents are ablated; None for those of 2, 5, 10, 20, 50, 100 and 500 that there are.
        test: Which rows are held out, or what part: the last rows of each label.
        mask: Of texts, which tokens are real.
        probes: One for each label, in order; None to fit them to train rows.
        l2: Penalty of those fits, on half the squared weights for all rows together.

    Raises:
        ShapeError: Arrays that do not fit each other or the dictionary.
        ArgumentError: More latents than there are, NaN, labels of one class, a label without train or test rows.
    """
    counts = numbers(n, dictionary.n_features)
    if l2 <= 0:
        raise ArgumentError(
            f"l2={l2}: the penalty must be above 0, or rows that can be separated have no optimum."
        )
    rows = labelled(dictionary, x, labels, test=test, mask=mask, written=True)
    check_probes(probes, len(rows.labels), rows.x.shape[1], f"the labels {list(rows.labels)}")
    measured = _perturbed(
        rows,
        decoder(dictionary),
        probes,
        jnp.asarray(counts, jnp.int32),
        max(counts),
        jnp.asarray(l2, rows.x.dtype),
    )
    return TargetedProbePerturbation(**measured, n=counts, classes=rows.labels)


@eqx.filter_jit
def _perturbed(
    rows: Labelled, W_dec: Array, probes: Logistic | None, n: Array, most: int, l2: Array
) -> dict[str, Any]:
    """The record's fields."""
    own = jnp.arange(len(rows.labels), dtype=jnp.int32)
    y = rows.label == own[:, None]
    fitted, held_out = (even(rows.label, own, part, len(own)) for part in (rows.train, ~rows.train))
    if probes is None:
        probes = jax.vmap(lambda *given: optimum(rows.x, *given, l2=l2))(y, fitted)
    before = probes.margins(rows.x)
    clean = accuracy(before, y, held_out)
    read = reads(W_dec, probes.weight)
    effects = jnp.maximum(mean_difference(rows.f, y, fitted), 0) * read.T
    after = lambda own: accuracy(before - removed(rows.f, read, own, n), y, held_out)
    accuracies = lax.map(after, effects).swapaxes(0, 1)  # (n, ablated, class)
    drops = clean - accuracies
    itself = jnp.eye(len(own), dtype=bool)
    intended = jnp.where(itself, drops, 0).sum(-1)
    unintended = jnp.where(itself, 0, drops).sum(-1) / (len(own) - 1)
    by_class = intended - unintended
    best, latents = lax.top_k(effects, most)
    means = {"score": by_class.mean(-1), "intended": intended.mean(-1), "unintended": unintended.mean(-1)}
    return means | {
        "by_class": by_class, "accuracy": accuracies, "clean": clean, "latents": latents, "effects": best,
        "probes": probes,
    }  # fmt: skip
