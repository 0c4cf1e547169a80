"""What evaluations by labels share: rows with their latents, classes against the rest, and what each row counts.

A row is a token, or a text: of texts (row, pos, d_model) the activations and the latents are averaged over tokens, the
latents after encoding. Every probe of a class sees it against all other labels. What a row counts is data, 0 for rows
that are held out, so that no program hangs on how rows are split.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.base.whole import whole
from mechjax.dictionaries import Dictionary, Normalized
from mechjax.dictionaries.products import at_least_float32

Autoencoder = Dictionary | Normalized
Labels = Int[Array | np.ndarray, " row"] | Bool[Array | np.ndarray, " row"]
HeldOut = Bool[Array | np.ndarray, " row"] | float
TOKENS = 4096
"""Tokens that are encoded at a time."""


class Labelled(eqx.Module):
    """Rows, checked and encoded.

    Attributes:
        x: Activations, averaged over a text's tokens.
        f: Latents, likewise.
        label: For each row the place of its label in `labels`.
        train: Which rows probes are fitted to; the others are held out.
        labels: All labels, in order (static).
    """

    x: Float[Array, "row d_model"]
    f: Float[Array, "row feature"]
    label: Int[Array, " row"]
    train: Bool[Array, " row"]
    labels: tuple[int, ...] = eqx.field(static=True)


def labelled(
    dictionary: Autoencoder,
    x: Float[Array | np.ndarray, "row *pos d_model"],
    labels: Labels,
    *,
    test: HeldOut,
    mask: Bool[Array | np.ndarray, "row pos"] | None = None,
    written: bool = False,
    spelled: Sequence[str] | None = None,
) -> Labelled:
    """Check rows and labels, and encode the rows.

    Args:
        dictionary: Of one site.
        x: Activations of tokens (row, d_model), or of texts (row, pos, d_model).
        labels: One integer or truth value for each row.
        test: Which rows are held out, or what part: then the last rows of each label, since rows of one text are near.
        mask: Of texts, which tokens are real; None for all.
        written: Whether latents are to be in the units in which rows of the decoder are added to `x`, which the
            dictionary then must give back: an autoencoder.
        spelled: How messages name each label; None for the label itself.

    Raises:
        ShapeError: Arrays that do not fit each other or the dictionary.
        ArgumentError: NaN, texts without tokens, labels of one class, or a label without train or test rows.
    """
    x, of_rows = jnp.asarray(x), np.asarray(labels)
    if x.ndim not in (2, 3) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"x has shape {x.shape} and dtype {x.dtype}: give activations of tokens (row, d_model), or of texts (row, "
            "pos, d_model), as floating-point numbers."
        )
    if of_rows.shape != x.shape[:1] or of_rows.dtype.kind not in "iub":
        raise ShapeError(
            f"labels have shape {of_rows.shape} and dtype {of_rows.dtype}, and x has shape {x.shape}: give one integer "
            f"or truth value for each of its {len(x)} rows."
        )
    if mask is not None and (x.ndim == 2 or mask.shape != x.shape[:2]):
        raise ShapeError(
            f"mask has shape {mask.shape} and x {x.shape}: a mask is (row, pos), of texts alone."
        )
    real = jnp.ones(x.shape[:2] if x.ndim == 3 else (len(x), 1), bool) if mask is None else jnp.asarray(mask)
    _check_numbers(x, real)
    _check_dictionary(dictionary, x.shape[-1], written=written)
    names, label = np.unique(of_rows, return_inverse=True)
    if len(names) < 2:
        raise ArgumentError(
            f"all {len(of_rows)} labels are {names.tolist()}: a probe tells one class from others, so give rows of at "
            "least two."
        )
    train = _split(label, [f"label {name}" for name in names] if spelled is None else spelled, test)
    x = x if x.ndim == 3 else x[:, None]
    mean, f = _encoded(dictionary, x, real, max(1, TOKENS // x.shape[1]), written)
    own = tuple(int(name) for name in names)
    return Labelled(mean, f, jnp.asarray(label, jnp.int32), jnp.asarray(train), own)


def chosen(labels: tuple[int, ...], classes: Any) -> tuple[int, ...]:
    """Places of the classes that are asked for: of two labels the larger one, of more all, unless they are named.

    Raises:
        ArgumentError: A class that no row has, or none.
    """
    if classes is None:
        return (1,) if len(labels) == 2 else tuple(range(len(labels)))
    wanted = tuple(int(c) for c in classes)
    if not wanted or any(c not in labels for c in wanted):
        raise ArgumentError(
            f"classes={list(wanted)}: give some of the labels that rows have, {list(labels)}."
        )
    return tuple(labels.index(c) for c in wanted)


def even(
    label: Int[Array, " row"], own: Int[Array, " probe"], rows: Bool[Array, " row"], n_labels: int
) -> Float[Array, "probe row"]:
    """What each of `rows` counts for each probe: 1 where it is of the class, and all other labels the same together.

    The others share it evenly: what drawing as many rows of the rest, equally from each label, gives on average.
    """
    counts = jnp.zeros(n_labels, jnp.float32).at[label].add(rows.astype(jnp.float32))
    others = (counts > 0).sum().astype(jnp.float32) - 1
    share = counts[own][:, None] / (others * jnp.maximum(counts, 1))
    counted = jnp.where(label == own[:, None], 1, share[:, label])
    return jnp.where(rows, counted, 0)


def mean_difference(
    f: Float[Array, "row feature"], y: Bool[Array, "probe row"], weights: Float[Array, "probe row"]
) -> Float[Array, "probe feature"]:
    """For each probe, mean latents of its class less those of the rest."""
    share = lambda side: side / side.sum(-1, keepdims=True)
    apart = share(jnp.where(y, weights, 0)) - share(jnp.where(y, 0, weights))
    return jnp.dot(apart, f, precision=lax.Precision.HIGHEST)


def decoder(dictionary: Autoencoder) -> Float[Array, "feature d_out"]:
    """What each latent adds for each unit of it, in the units of `written` latents."""
    return dictionary.dictionary.W_dec if isinstance(dictionary, Normalized) else dictionary.W_dec


def _check_numbers(x: Array, real: Array) -> None:
    tokens = x if x.ndim == 3 else x[:, None]
    bad = np.flatnonzero(whole((~jnp.isfinite(tokens).all(-1) & real).any(-1)))
    if len(bad):
        raise ArgumentError(
            f"{len(bad)} of {len(x)} rows of x hold NaN or infinity, first rows {bad[:5].tolist()}: every probe would "
            "be NaN. Leave them out, with their labels."
        )
    empty = np.flatnonzero(~whole(real.any(-1)))
    if len(empty):
        raise ArgumentError(
            f"rows {empty[:5].tolist()} of the mask have no real token: leave these texts out, with their labels."
        )


def _check_dictionary(dictionary: Autoencoder, width: int, *, written: bool) -> None:
    W_dec = decoder(dictionary)
    if W_dec.ndim != 2:
        raise ShapeError(
            f"the decoder has shape {W_dec.shape}: give a dictionary of one site, (feature, d_model), not one of "
            "several sites or a stack of dictionaries."
        )
    if width != dictionary.d_model:
        raise ShapeError(
            f"x holds vectors of length {width}, and this dictionary reads vectors of length {dictionary.d_model}: "
            "give activations of the site that it was made for."
        )
    if written and W_dec.shape[-1] != width:
        raise ShapeError(
            f"this dictionary reads {width} numbers and writes {W_dec.shape[-1]}: what is asked compares what latents "
            "write with what they read, so give an autoencoder."
        )


def _split(label: np.ndarray, names: Sequence[str], test: Any) -> np.ndarray:
    """Which rows are for training."""
    counts = np.bincount(label)
    if np.ndim(test) == 0:
        if isinstance(test, bool | np.bool_) or not 0 < test < 1:
            raise ArgumentError(
                f"test={test!r}: give the part of rows that is held out, above 0 and below 1, or a mask."
            )
        held = np.maximum(1, np.rint(test * counts)).astype(int)
        order = np.argsort(label, kind="stable")
        place = np.empty(len(label), int)
        place[order] = np.arange(len(label)) - (np.cumsum(counts) - counts)[label[order]]
        train = place < (counts - held)[label]
    else:
        train = ~np.asarray(test)
        if train.shape != label.shape or train.dtype.kind != "b":
            raise ShapeError(
                f"test has shape {np.shape(test)} and dtype {np.asarray(test).dtype}: give a truth value for each of "
                f"{len(label)} rows, true where it is held out."
            )
    fitted, held_out = (
        np.bincount(label[train], minlength=len(names)),
        np.bincount(label[~train], minlength=len(names)),
    )
    for name, n, m in zip(names, fitted, held_out, strict=True):
        if not n or not m:
            raise ArgumentError(
                f"{name}: {n} rows to fit probes to and {m} test rows, and both need at least one. Give more rows, "
                "or another `test`."
            )
    return train


@eqx.filter_jit
def _encoded(
    dictionary: Autoencoder, x: Array, real: Array, rows: int, written: bool
) -> tuple[Float[Array, "row d_model"], Float[Array, "row feature"]]:
    """Means over real tokens of what is read and of its latents, `rows` texts at a time."""
    n = len(x)
    rows = min(rows, n)
    padded = [jnp.pad(z, ((0, -n % rows), *((0, 0) for _ in z.shape[1:]))) for z in (x, real)]
    chunks = tuple(z.reshape(-1, rows, *z.shape[1:]) for z in padded)

    def chunk(given: tuple[Array, Array]) -> tuple[Array, Array]:
        x, real = given
        x = jnp.where(real[..., None], x, 0)  # so that padding of NaN does no harm
        f = dictionary.encode(x)
        if written and isinstance(dictionary, Normalized):
            ends = (dictionary.completed(fill(x), x) for fill in (jnp.ones_like, jnp.zeros_like))
            ones, zeros = ends
            f = f * (ones - zeros).mean(-1, keepdims=True)  # what it multiplies a token's output by
        count = jnp.maximum(real.sum(1), 1)[:, None]
        wide = at_least_float32(x.dtype)
        mean = lambda z: jnp.where(real[..., None], z.astype(wide), 0).sum(1) / count.astype(wide)
        return mean(x), mean(f)

    return tuple(z.reshape(-1, z.shape[-1])[:n] for z in lax.map(chunk, chunks))
