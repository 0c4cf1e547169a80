"""How much of a label can be read from few latents, and how much from all of them, or from the activations themselves?

For each class against the rest:

- latents (and, beside them, coordinates of the activations) are ordered by the size of the difference of their means
  over train rows of the class and of the rest; a probe of `k` reads the first k alone;
- probes are logistic regressions at their optimum, with the penalty `l2` (1 / C of scikit-learn);
- accuracy, F1 and the area under the ROC curve are those of test rows.

With `balanced`, each class counts as much as the rest, and in the rest each label as much as any other, in fitting and
in measuring: an accuracy of 0.5 is chance.

Reference: Gurnee et al. (2023), "Finding neurons in a haystack", arXiv:2305.01610 (maximum mean difference);
Karvonen et al. (2025), SAEBench, arXiv:2503.09532, and its code at 0.6.0. Differs: where SAEBench draws as many rows of
the rest as the class has, rows are weighted, which is what draws are on average; probes of all latents and of
activations are at their optimum, where SAEBench keeps the epoch that is best on test rows.
Cost: an encoding of all rows, and some tens of products of rows with vectors for each probe.
Misleads when: k coordinates of the activations do as well (`activations, k=...`), or rows of one text are in both
parts; `test` may say which are held out.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.base.meshes import on_any_mesh
from mechjax.base.records import Record
from mechjax.dicteval.classified import every
from mechjax.dicteval.labelled import (
    Autoencoder,
    HeldOut,
    Labelled,
    Labels,
    chosen,
    even,
    labelled,
    mean_difference,
)
from mechjax.fit.logistic import optimum


class SparseProbing(Record):
    """What probes of few latents, of few coordinates, of all latents and of activations tell, on test rows.

    Attributes:
        accuracy: Part of rows on the right side. Probes are in the order of `probes`: those of k latents first.
        f1: Harmonic mean of precision and recall.
        auroc: Area under the ROC curve.
        latents: For each class its latents, that of the largest difference first.
        difference: Their mean over rows of the class less that over the rest.
        residual: How far each probe is from its optimum; see `mechjax.fit.Logistic`.
        probes: What each probe reads (static).
        classes: The class of each column (static).
        k: How many latents the first probes read (static).
    """

    accuracy: Float[Array, "probe class"]
    f1: Float[Array, "probe class"]
    auroc: Float[Array, "probe class"]
    latents: Int[Array, "class rank"]
    difference: Float[Array, "class rank"]
    residual: Float[Array, "probe class"]
    probes: tuple[str, ...] = eqx.field(static=True)
    classes: tuple[int, ...] = eqx.field(static=True)
    k: tuple[int, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of probes and classes."""
        return {"probe": self.probes, "class": tuple(f"class {c}" for c in self.classes)}


@on_any_mesh
def sparse_probing(
    dictionary: Autoencoder,
    x: Float[Array | np.ndarray, "row *pos d_model"],
    labels: Labels,
    *,
    k: Sequence[int] = (1, 2, 5),
    test: HeldOut = 0.25,
    mask: Bool[Array | np.ndarray, "row pos"] | None = None,
    classes: Sequence[int] | None = None,
    balanced: bool = True,
    l2: float = 1.0,
) -> SparseProbing:
    """Probe for labels in few latents.

    Args:
        dictionary: The dictionary.
        x: Activations of tokens (row, d_model), or of texts (row, pos, d_model): then means over tokens are probed.
        labels: One integer or truth value for each row.
        k: How many latents probes read.
        test: Which rows are held out, or what part: the last rows of each label.
        mask: Of texts, which tokens are real.
        classes: The labels that are probed for; None for the larger one of two, and for all of more.
        balanced: Whether a class counts as much as the rest.
        l2: Penalty on half the squared weights of a probe, for all rows together.

    Raises:
        ShapeError: Arrays that do not fit each other or the dictionary.
        ArgumentError: More latents than there are, NaN, labels of one class, a label without train or test rows.
    """
    ks, n = tuple(int(i) for i in k), dictionary.n_features
    if not ks or not all(1 <= i <= n for i in ks) or l2 <= 0:
        raise ArgumentError(
            f"k={list(ks)}, l2={l2}: the dictionary has {n} latents, so ask for 1 to {n} of them, with a penalty "
            "above 0."
        )
    rows = labelled(dictionary, x, labels, test=test, mask=mask)
    own = chosen(rows.labels, classes)
    few = tuple(min(i, rows.x.shape[1]) for i in ks)
    counts = jnp.asarray([ks, few], jnp.int32), (max(ks), max(few))
    options = jnp.asarray(balanced), jnp.asarray(l2, rows.x.dtype)
    measured = _probed(rows, jnp.asarray(own, jnp.int32), *counts, *options)
    of_latents, of_activations = [f"latents, k={i}" for i in ks], [f"activations, k={i}" for i in few]
    names = (*of_latents, "all latents", *of_activations, "all activations")
    return SparseProbing(**measured, probes=names, classes=tuple(rows.labels[i] for i in own), k=ks)


@eqx.filter_jit
def _probed(
    rows: Labelled, own: Array, k: Array, most: tuple[int, int], balanced: Array, l2: Array
) -> dict[str, Array]:
    """The record's arrays."""
    y = rows.label == own[:, None]
    evenly = (even(rows.label, own, part, len(rows.labels)) for part in (rows.train, ~rows.train))
    plainly = (rows.train, ~rows.train)
    fitted, held_out = (
        jnp.where(balanced, a, b.astype(a.dtype)).astype(l2.dtype)
        for a, b in zip(evenly, plainly, strict=True)
    )
    fit = lambda x, y, weights: optimum(x, y, weights, l2=l2)
    margins = jax.vmap(lambda probe, x: probe.margins(x))

    largest, chosen, wholes = [], [], []
    for read, n in zip((rows.f, rows.x), most, strict=True):
        difference = mean_difference(read, y, fitted)
        places = lax.top_k(jnp.abs(difference), n)[1]
        chosen.append((places, jnp.take_along_axis(difference, places, 1)))
        some = read[:, places].swapaxes(0, 1)  # (class, row, rank)
        largest.append(jnp.pad(some, ((0, 0), (0, 0), (0, max(most) - n))))
        whole = jax.vmap(fit, (None, 0, 0))(read, y, fitted)
        wholes.append((whole.margins(read), whole.residual))

    def first(some: Array, k: Array) -> tuple[Array, Array]:
        """Probes of the first k: others' columns are 0, and so are their weights."""
        kept = jnp.where(jnp.arange(max(most)) < k, some, 0)
        probes = jax.vmap(fit)(kept, y, fitted)
        return margins(probes, kept), probes.residual

    sparse = jax.vmap(jax.vmap(first, (None, 0)))(jnp.stack(largest), k)
    joined = [
        jnp.concatenate([sparse[i][0], wholes[0][i][None], sparse[i][1], wholes[1][i][None]])
        for i in range(2)
    ]
    measures = every(joined[0], y, held_out)
    latents, difference = chosen[0]
    return {
        "accuracy": measures.accuracy, "f1": measures.f1, "auroc": measures.auroc, "latents": latents,
        "difference": difference, "residual": joined[1],
    }  # fmt: skip
