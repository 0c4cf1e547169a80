"""Does a latent for a class fall silent where more special latents have taken its part over?

For each class, with a probe of direction u (length 1) fitted to activations:

- *Main latents*: an L1-penalised probe of all latents orders them by weight; probes of the first 1, 2, ... of them are
  fitted, and latents are main as long as each more raises F1 on test rows by more than `jump`.
- Judged are test rows of the class that its probe finds. With p = x . u what the probe's direction holds of a row, and
  c_j = f_j (W_dec[j] . u) what latent j puts there:
- *Full absorption*: no main latent is active, the latent of largest c_j has a cosine of at least `full_cosine` with u,
  and it makes up at least `share` of p.
- *Absorption fraction*: A is the sum of the `absorbers` largest c_j > 0 of other latents with a cosine of at least
  `cosine`, M that of the main latents. 0 where A < share p or M >= p; 1 where M <= 0; else a / (a + M) with
  a = min(A, p - M).

Reference: Chanin et al. (2024), "A is for absorption", arXiv:2409.14507; SAEBench (2025),
arXiv:2503.09532, and its code at 0.6.0, whose constants these are: it asks for projections where the paper asked for
integrated gradients of an answer, so no model is run. The authors' classes are first letters of words; these are any.
Differs: rows are judged where they were probed, not in other prompts; probes are at their optimum, where SAEBench's
orders latents by one that is stopped long before; with a decoder whose rows are not of length 1, c_j has the length in
it; a row of p = 0 is not absorbed.
Cost: an encoding, a fit to all latents for each class, and `k` fits to few.
Misleads when: one latent absorbs so much of a class that it raises F1 by `jump`: it then is a main latent, and nothing
is absorbed; the dictionary is too narrow or not trained: where no latent stands for a class, none absorbs it.
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
from mechjax.dicteval.ablated import check_probes, reads
from mechjax.dicteval.classified import Classified, classified, every
from mechjax.dicteval.labelled import Autoencoder, HeldOut, Labelled, Labels, chosen, decoder, labelled
from mechjax.fit.logistic import Logistic, optimum

SILENT = 1e-8
"""What latents are taken to be silent below."""
L2_OF_L1 = 1e-6
"""Penalty on half the squared weights of the probe that orders latents, beside its `l1`: as SAEBench's weight decay."""


class Absorption(Record):
    """How often main latents of a class are silent or weak where others have taken their part.

    Attributes:
        full: For each class the part of judged rows with full absorption; NaN where none is judged.
        fraction: Mean absorption fraction over judged rows.
        judged: How many rows were judged: test rows of the class that its probe finds.
        n_main: How many of `latents` are main latents.
        probe_f1: F1 of the class's probe of activations, on test rows.
        latents: For each class its latents, that of the largest weight first.
        f1: F1 of probes of the first latents, 1, 2 and so on; NaN where main latents were given.
        counted: Classes whose probe is good enough for the means.
        mean_full: Mean of `full` over these.
        mean_fraction: Mean of `fraction` over these.
        of_row: For each row of `x` its absorption fraction; NaN where it was not judged.
        absorber: For each row the latent that has fully absorbed its class; -1 for none.
        probes: The probes of activations.
        classes: The classes (static).
    """

    full: Float[Array, "class"]
    fraction: Float[Array, "class"]
    judged: Int[Array, "class"]
    n_main: Int[Array, "class"]
    probe_f1: Float[Array, "class"]
    latents: Int[Array, "class rank"]
    f1: Float[Array, "class rank"]
    counted: Bool[Array, "class"]
    mean_full: Float[Array, ""]
    mean_fraction: Float[Array, ""]
    of_row: Float[Array, "row"]
    absorber: Int[Array, "row"]
    probes: Logistic
    classes: tuple[int, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of classes."""
        return {"class": tuple(f"class {c}" for c in self.classes)}


class _Limits(eqx.Module):
    """Numbers that say what absorption is; data, all of them."""

    jump: Array
    full_cosine: Array
    cosine: Array
    share: Array
    least_f1: Array
    l1: Array
    l2: Array


@on_any_mesh
def absorption(
    dictionary: Autoencoder,
    x: Float[Array | np.ndarray, "row d_model"],
    labels: Labels,
    *,
    test: HeldOut = 0.25,
    classes: Sequence[int] | None = None,
    probes: Logistic | None = None,
    main: Bool[Array | np.ndarray, "class feature"] | None = None,
    k: int = 10,
    jump: float = 0.03,
    full_cosine: float = 0.025,
    cosine: float = 0.1,
    share: float = 0.4,
    absorbers: int = 3,
    least_f1: float = 0.6,
    l1: float = 0.01,
    l2: float = 1.0,
) -> Absorption:
    """Measure how far latents of classes are absorbed by others.

    Args:
        dictionary: An autoencoder of one site.
        x: Activations of tokens.
        labels: One integer or truth value for each row, such as the place of a word's first letter in the alphabet.
        test: Which rows are held out and judged, or what part: the last rows of each label.
        classes: The labels that are measured; None for the larger one of two, and for all of more.
        probes: One for each of them, in order; None to fit them to train rows.
        main: Which latents are main latents of each of them; None to find them.
        k: Most main latents that are found.
        jump: F1 that each further main latent must add.
        full_cosine: Least cosine with the probe of a latent that absorbs a class fully.
        cosine: Least cosine of those that do in part.
        share: Least share of the probe's projection that they make up.
        absorbers: Most latents that absorb a class together.
        least_f1: F1 above which a class's probe is good enough for the class to be in the means.
        l1: Penalty on the size of weights of the probe that orders latents, for the mean over rows.
        l2: Penalty of the other fits, on half the squared weights for all rows together.

    Raises:
        ShapeError: Arrays that do not fit each other or the dictionary.
        ArgumentError: More latents than there are, NaN, labels of one class, a label without train or test rows.
    """
    n = dictionary.n_features
    if not 1 <= k <= n or not 1 <= absorbers <= n or l1 <= 0 or l2 <= 0:
        raise ArgumentError(
            f"k={k}, absorbers={absorbers}, l1={l1}, l2={l2}: the dictionary has {n} latents, so ask for 1 to {n} of "
            "them, with penalties above 0."
        )
    if np.ndim(x) != 2:
        raise ShapeError(
            f"x has shape {np.shape(x)}: give activations of tokens (row, d_model), one token for a row."
        )
    rows = labelled(dictionary, x, labels, test=test, written=True)
    own = chosen(rows.labels, classes)
    names = tuple(rows.labels[i] for i in own)
    check_probes(probes, len(own), rows.x.shape[1], f"the classes {list(names)}")
    if main is not None and (np.shape(main) != (len(own), n) or np.asarray(main).dtype != bool):
        raise ShapeError(
            f"main has shape {np.shape(main)}: give truth values ({len(own)}, {n}), which latents are main latents of "
            f"each of the classes {list(names)}."
        )
    limits = _Limits(
        *(jnp.asarray(z, rows.x.dtype) for z in (jump, full_cosine, cosine, share, least_f1, l1, l2))
    )
    given = None if main is None else jnp.asarray(main)
    measured = _absorbed(
        rows, decoder(dictionary), jnp.asarray(own, jnp.int32), probes, given, limits, k, absorbers
    )
    return Absorption(**measured, classes=names)


@eqx.filter_jit
def _absorbed(
    rows: Labelled,
    W_dec: Array,
    own: Array,
    probes: Logistic | None,
    main: Array | None,
    limits: _Limits,
    k: int,
    absorbers: int,
) -> dict[str, Any]:
    """The record's fields."""
    y = rows.label == own[:, None]
    train, test = (part.astype(rows.x.dtype) for part in (rows.train, ~rows.train))
    if probes is None:
        probes = jax.vmap(lambda *given: optimum(rows.x, *given, l2=limits.l2))(y, _halves(y, train))
    of_rows = probes.margins(rows.x)
    probe_f1 = jax.vmap(classified, (0, 0, None))(of_rows, y, test).f1
    if main is None:
        latents, f1 = _few(rows, y, train, test, limits, k)
        jumps = f1[:, 1:] > f1[:, :-1] + limits.jump
        n_main = 1 + jnp.cumprod(jumps.astype(jnp.int32), 1).sum(1)
        kept = jnp.arange(k) < n_main[:, None]
        main = jnp.zeros((len(own), len(W_dec)), bool).at[jnp.arange(len(own))[:, None], latents].max(kept)
    else:
        latents, n_main = lax.top_k(main.astype(train.dtype), k)[1], main.sum(1)
        f1 = jnp.full((len(own), k), jnp.nan, train.dtype)

    place = y.argmax(0)
    judged = (~rows.train & y & (of_rows > 0)).any(0)
    fraction, absorber = _rows_absorbed(rows, W_dec, probes.weight, main, place, limits, absorbers)
    full = judged & (absorber >= 0)
    count = (y & judged).sum(1)
    over = lambda number: jnp.where(number > 0, number.astype(train.dtype), jnp.nan)
    rate = lambda z: jnp.where(y & judged, z, 0).sum(1) / over(count)
    rates = {"full": rate(full.astype(train.dtype)), "fraction": rate(fraction)}
    counted = (probe_f1 > limits.least_f1) & (count > 0)
    means = {
        f"mean_{name}": jnp.where(counted, z, 0).sum() / over(counted.sum()) for name, z in rates.items()
    }
    return rates | means | {
        "judged": count, "n_main": n_main, "probe_f1": probe_f1, "latents": latents, "f1": f1, "counted": counted,
        "of_row": jnp.where(judged, fraction, jnp.nan), "absorber": jnp.where(full, absorber, -1), "probes": probes,
    }  # fmt: skip


def _halves(y: Array, rows: Array) -> Array:
    """What rows count where a class counts as much as the rest, and all as much as there are rows."""
    counts = [jnp.where(side, rows, 0).sum(-1, keepdims=True) for side in (y, ~y)]
    return rows.sum() / 2 * jnp.where(y, rows / counts[0], rows / counts[1])


def _few(
    rows: Labelled, y: Array, train: Array, test: Array, limits: _Limits, k: int
) -> tuple[Int[Array, "class k"], Float[Array, "class k"]]:
    """For each class its latents by weight in the L1-penalised probe, and F1 of probes of the first 1 to k."""
    weights = _halves(y, train)
    of_rest = jnp.where(y, 0, train).sum(-1, keepdims=True)
    # as if rows of the class counted more until they count as much as the rest, divided by the number of rows
    ordering = weights * of_rest * 2 / train.sum() ** 2
    order = jax.vmap(
        lambda *given: optimum(rows.f, *given, l1=limits.l1, l2=jnp.asarray(L2_OF_L1, train.dtype)).weight
    )(y, ordering)
    latents = lax.top_k(order, k)[1]
    some = rows.f[:, latents].swapaxes(0, 1)  # (class, row, rank)

    def first(k: Array) -> Array:
        kept = jnp.where(jnp.arange(some.shape[-1]) <= k, some, 0)
        fitted = jax.vmap(lambda *given: optimum(*given, l2=limits.l2))(kept, y, weights)
        return jax.vmap(lambda probe, x: probe.margins(x))(fitted, kept)

    counted = jnp.broadcast_to(test, y.shape)
    measured: Classified = every(jax.vmap(first)(jnp.arange(k)), y, counted)
    return latents, measured.f1.T


def _rows_absorbed(
    rows: Labelled, W_dec: Array, weight: Array, main: Array, place: Array, limits: _Limits, absorbers: int
) -> tuple[Float[Array, " row"], Int[Array, " row"]]:
    """For each row, by the class at `place`: its absorption fraction, and the latent that has absorbed it or -1."""
    tiny = jnp.finfo(rows.x.dtype).tiny
    u = weight / jnp.maximum(jnp.linalg.norm(weight, axis=-1, keepdims=True), tiny)
    along, lengths = reads(W_dec, u).T, jnp.linalg.norm(W_dec.astype(u.dtype), axis=-1)
    cosines = along / jnp.maximum(lengths, tiny)
    held = (rows.x * u[place]).sum(-1)
    put = rows.f * along[place]
    of_main = main[place]

    silent = ~(of_main & (rows.f * lengths >= SILENT)).any(-1)
    top = put.argmax(-1)
    at_top = lambda z: jnp.take_along_axis(z, top[:, None], -1)[:, 0]
    aligned = cosines[place, top] >= limits.full_cosine
    full = silent & aligned & (held > 0) & (at_top(put) >= limits.share * held)

    by_main = jnp.where(of_main, put, 0).sum(-1)
    others = jnp.where(of_main | (cosines[place] < limits.cosine), 0, jnp.maximum(put, 0))
    by_others = lax.top_k(others, absorbers)[0].sum(-1)
    part = jnp.minimum(by_others, held - by_main)
    whole = jnp.where(by_main <= 0, 1, jnp.clip(part / jnp.where(by_main <= 0, 1, part + by_main), 0, 1))
    none = (by_main >= held) | (by_others < limits.share * held) | (held <= 0)
    return jnp.where(none, 0, whole), jnp.where(full, top.astype(jnp.int32), -1)
