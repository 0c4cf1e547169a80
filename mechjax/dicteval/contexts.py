"""Where is a latent active? Its strongest tokens in their contexts, a sample over its whole range, and its histogram.

- `strongest`: the tokens of largest activation, the earlier first where two are equal.
- `sample`: with the range from 0 to the largest activation cut into as many equal parts as are asked for, the token of
  each part that is nearest its middle, from the highest part down. Top contexts alone flatter a latent: many that are
  clear there are not below.
- `histogram`: how many tokens lie in each of `bins` equal parts of that range; `density` is the part of tokens in which
  the latent is active at all.
- `lens` and `near`: the tokens that its row of the decoder speaks for, and the latents that write alike
  (`decoder_lens`, `neighbours`).

Batches are gone through twice: the range is known after the first time. The best tokens so far are kept on the device
with their contexts, so that memory is that of one batch, its latents, and what is kept. Padding, and first tokens where
they are left out, count nowhere and stand in no context.

Reference: Bricken et al. (2023), "Towards monosemanticity", whose dashboards have the same parts. Differs: their sample
is random in each part, this one is determined. Cost: two forwards of the model for each batch, of a decoder up to
the layer.
Misleads when: texts are few: of a rare latent the top contexts are then all that there is, and look clearer than they
are.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from mechjax.base.catalogue import canonical
from mechjax.base.errors import ArgumentError
from mechjax.base.inputs import Inputs
from mechjax.base.meshes import on_any_mesh
from mechjax.base.progress import bar
from mechjax.base.records import Record
from mechjax.base.whole import whole
from mechjax.dicteval.chosen_latents import chosen_latents
from mechjax.dicteval.decoder_lens import DecoderLens, decoder_lens
from mechjax.dicteval.neighbours import Neighbours, neighbours
from mechjax.dictionaries import Dictionary, Normalized
from mechjax.models.decoder import Decoder
from mechjax.models.structures import Model
from mechjax.store.calls import Reader, Reading, batch_of, reading
from mechjax.store.rows import Column, captured, column_of

_STREAM = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
_NEAR = 6  # neighbours of each


class Examples(Record):
    """Tokens at which latents are active, each in its context. Where a latent has fewer: 0, and -1 for numbers.

    Attributes:
        activation: The latent's there.
        text: Which text it is, counted through all batches.
        pos: Where in the text it stands.
        tokens: The tokens around it, which is at `before`; -1 where the text has ended. Of images, and of
            what else is no text, the numbers of positions.
        activations: The latent's at each of them.
        before: How many tokens stand before it (static).
    """

    activation: Float[Array, "feature example"]
    text: Int[Array, "feature example"]
    pos: Int[Array, "feature example"]
    tokens: Int[Array, "feature example window"]
    activations: Float[Array, "feature example window"]
    before: int = eqx.field(static=True)


class Contexts(Record):
    """What is seen of each latent in texts.

    Attributes:
        density: The part of tokens in which it is active.
        largest: Its largest activation.
        mean: Its mean activation where it is active.
        histogram: Tokens in each part of the range from 0 to the largest.
        latents: Their numbers.
        strongest: The tokens of largest activation.
        sample: One token for each part of the range, from the highest down.
        lens: Tokens that it speaks for; None where it does not write to a decoder's residual stream.
        near: Latents that write alike; None for a dictionary of one latent.
        tokens: How many tokens were looked at.
        n_features: Latents of the dictionary (static).
        site: What the dictionary reads (static).
        layer: Of which layer; None outside the layers (static).
    """

    density: Float[Array, "feature"]
    largest: Float[Array, "feature"]
    mean: Float[Array, "feature"]
    histogram: Int[Array, "feature bin"]
    latents: Int[Array, "feature"]
    strongest: Examples
    sample: Examples
    lens: DecoderLens | None
    near: Neighbours | None
    tokens: Int[Array, ""]
    n_features: int = eqx.field(static=True)
    site: str = eqx.field(static=True)
    layer: int | None = eqx.field(static=True)

    @property
    def where(self) -> str:
        """Site and layer, in words."""
        return self.site if self.layer is None else f"{self.site}, layer {self.layer}"

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """The latents' numbers."""
        return {"feature": tuple(map(str, self.latents.tolist()))}


class _Batch(eqx.Module):
    """Latents of a batch of texts, 0 at tokens that do not count.

    Attributes:
        values: What they are.
        ids: The tokens.
        counted: Which of them count.
        first: The number of the first text.
        broken: How many activations are not finite.
    """

    values: Float[Array, "text pos feature"]
    ids: Int[Array, "text pos"]
    counted: Bool[Array, "text pos"]
    first: Int[Array, ""]
    broken: Int[Array, ""]


class _Found(eqx.Module):
    """The best tokens so far, and how good each is."""

    score: Float[Array, "feature example"]
    examples: Examples


@on_any_mesh
def contexts(
    model: Model | Callable[..., Any],
    prompts: Iterable[Any],
    dictionary: Dictionary | Normalized,
    *,
    layer: int | None,
    site: str = "resid_post",
    written: str | None = None,
    latents: Sequence[int] | None = None,
    n: int = 10,
    sampled: int = 10,
    bins: int = 40,
    before: int = 12,
    after: int = 4,
    promoted: int = 10,
    skip_first: bool = False,
) -> Contexts:
    """Look for the tokens at which latents are active.

    Args:
        model: The model, a subject (`mechjax.interop`), or any function with sites, which runs whole.
        prompts: Batches of prompts as `mechjax.dictlearn.activations` takes them, best all of one shape. They are held.
        dictionary: The dictionary.
        layer: The layer that it reads; None for a site outside the layers.
        site: What it reads, made rows as in `mechjax.dictlearn.activations`.
        written: What it writes, where that is another site, as for a transcoder.
        latents: Which to look at; None for all.
        n: How many of the strongest tokens to keep of each.
        sampled: How many parts of the range to show a token of.
        bins: Parts of the range in the histogram.
        before: Tokens of context before.
        after: Tokens of context after.
        promoted: How many tokens that it speaks for, and against, to name.
        skip_first: Whether the first real token of each text is left out: it often is far larger than all others.

    Raises:
        ArgumentError: No prompts, too small a count, no such latent, several sites, numbers that are not finite, or two
            texts of which it is not known which one the site reads.
        ShapeError: A dictionary of another width.
        SiteError: A site or layer that there is not, or padded texts of which it is not known which rows they gave.
        NeedsDecoderError: Something that cannot be called.
    """
    chosen = chosen_latents(
        dictionary, latents, n=n, sampled=sampled, bins=bins, promoted=promoted, before=before + 1,
        after=after + 1,
    )  # fmt: skip
    if not (held := list(prompts)):
        raise ArgumentError("`prompts` holds no batch: give at least one, `Prompts` or ids (batch, pos).")
    read = reading(model, held)
    fresh = lambda: _batches(read, column_of(read, site, layer), dictionary, jnp.asarray(chosen), skip_first)
    with bar("Looking for contexts", 2 * len(held)) as progress:
        best, sums, tokens = _nothing(len(chosen), n, before, after), np.zeros((2, len(chosen))), 0
        for batch in fresh():
            _check_finite(batch)
            best, added = _strongest(best, batch)
            sums, tokens = sums + whole(added, np.float64), tokens + int(batch.counted.sum())
            progress.advance()
        largest = best.examples.activation[:, 0]
        spread = _nothing(len(chosen), sampled, before, after)
        histogram = np.zeros((len(chosen), bins), np.int64)
        for batch in fresh():
            spread, added = _spread(spread, batch, largest, bins)
            histogram += whole(added)
            progress.advance()
    numbers = chosen.tolist()
    return Contexts(
        density=jnp.asarray(sums[0] / max(tokens, 1), jnp.float32),
        largest=largest,
        mean=jnp.asarray(sums[1] / np.maximum(sums[0], 1), jnp.float32),
        histogram=jnp.asarray(histogram, jnp.int32),
        latents=jnp.asarray(chosen),
        strongest=_tidy(best.examples),
        sample=_tidy(spread.examples),
        lens=_lens(model, dictionary, written or site, numbers, promoted),
        near=neighbours(dictionary, latents=numbers, n=_NEAR) if dictionary.n_features > 1 else None,
        tokens=jnp.asarray(tokens, jnp.int32),
        n_features=dictionary.n_features,
        site=site,
        layer=layer,
    )


def _lens(model: Any, dictionary: Any, written: str, latents: list[int], n: int) -> DecoderLens | None:
    """What latents speak for, where they write to a decoder's stream."""
    if not isinstance(model, Decoder) or canonical(written)[0] not in _STREAM:
        return None
    return decoder_lens(model, dictionary, latents=latents, n=n)


def _batches(
    read: Reading, columns: tuple[Column], dictionary: Any, chosen: Array, skip_first: bool
) -> Iterator[_Batch]:
    """The chosen latents of each batch of texts."""
    first = 0
    for some in read.prompts:
        batch = batch_of(read.model, some, skip_first=skip_first)
        values, places = _latents(read.model, dictionary, chosen, batch.given, columns)
        ids = batch.shown(places)
        yield _counted(values, ids, jnp.asarray(batch.real(places)).reshape(ids.shape), jnp.int32(first))
        first += len(ids)


@eqx.filter_jit
def _latents(
    model: Reader, dictionary: Any, chosen: Array, given: Inputs, columns: tuple[Column]
) -> tuple[Float[Array, "token feature"], tuple[int, ...]]:
    """One program for both times: what is nearest the middle of a part is so to the bit."""
    (x,), places = captured(model, given, columns)
    return dictionary.encode(x)[..., chosen].astype(jnp.float32), places


@eqx.filter_jit
def _counted(f: Float[Array, "token feature"], ids: Array, counted: Array, first: Array) -> _Batch:
    """With 0 where no token counts."""
    f = f.reshape(*ids.shape, -1)
    broken = (counted[..., None] & ~jnp.isfinite(f)).sum(dtype=jnp.int32)
    return _Batch(jnp.where(counted[..., None] & (f > 0), f, 0), ids, counted, first, broken)


def _check_finite(batch: _Batch) -> None:
    """Whether all latents are numbers.

    Raises:
        ArgumentError: Some are not.
    """
    if broken := int(batch.broken):
        raise ArgumentError(
            f"{broken} activations of latents are not finite, in texts {int(batch.first)} to "
            f"{int(batch.first) + len(batch.ids) - 1}: the model or the dictionary overflows there. Look at that batch."
        )


def _nothing(n_latents: int, n: int, before: int, after: int) -> _Found:
    """No token found yet."""
    shape, window = (n_latents, n), (n_latents, n, before + 1 + after)
    none, numbers = jnp.zeros(shape, jnp.float32), jnp.full(shape, -1, jnp.int32)
    examples = Examples(
        none, numbers, numbers, jnp.full(window, -1, jnp.int32), jnp.zeros(window, jnp.float32), before
    )
    return _Found(jnp.full(shape, -jnp.inf, jnp.float32), examples)


@eqx.filter_jit
def _strongest(found: _Found, batch: _Batch) -> tuple[_Found, Float[Array, "2 feature"]]:
    """The largest of those so far and those of the batch; and in how many tokens each is active, and their sum."""
    n, flat = found.score.shape[1], _flat(batch)
    score, at = lax.top_k(flat, min(n, flat.shape[1]))
    both = jax.tree.map(
        lambda a, b: jnp.concatenate([a, b], 1), found, _Found(score, _cut(batch, at, found.examples))
    )
    kept, order = lax.top_k(both.score, n)  # the earlier first where equal
    chosen = jax.tree.map(
        lambda x: jnp.take_along_axis(x, order.reshape(*order.shape, *[1] * (x.ndim - 2)), 1), both.examples
    )
    return _Found(kept, chosen), jnp.stack([(flat > 0).sum(1).astype(jnp.float32), flat.sum(1)])


@eqx.filter_jit
def _spread(
    found: _Found, batch: _Batch, largest: Float[Array, " feature"], bins: int
) -> tuple[_Found, Int[Array, "feature bin"]]:
    """Of each part of the range the token nearest its middle, of those so far and those of the batch; a histogram."""
    n, flat = found.score.shape[1], _flat(batch)
    share = flat / jnp.where(largest > 0, largest, 1)[:, None]
    part = lambda of: jnp.clip(jnp.ceil(share * of).astype(jnp.int32) - 1, 0, of - 1)
    own, active = part(n), flat > 0

    def nearest(i: Int[Array, ""]) -> tuple[Array, Array]:
        away = jnp.abs(share - (i.astype(jnp.float32) + 0.5) / n)
        score = jnp.where(active & (own == i), -away, -jnp.inf)
        at = score.argmax(1)  # the first of equals
        return jnp.take_along_axis(score, at[:, None], 1)[:, 0], at

    score, at = (x.T for x in lax.map(nearest, jnp.arange(n - 1, -1, -1, dtype=jnp.int32)))
    fresh, better = _Found(score, _cut(batch, at, found.examples)), score > found.score
    kept = jax.tree.map(
        lambda a, b: jnp.where(better.reshape(*better.shape, *[1] * (a.ndim - 2)), b, a), found, fresh
    )
    rows = jnp.arange(len(flat))[:, None]
    counts = jnp.zeros((len(flat), bins), jnp.int32).at[rows, part(bins)].add(active.astype(jnp.int32))
    return kept, counts


def _flat(batch: _Batch) -> Float[Array, "feature token"]:
    """Latents by tokens, in the order of texts."""
    return batch.values.reshape(-1, batch.values.shape[-1]).T


def _cut(batch: _Batch, at: Int[Array, "feature example"], like: Examples) -> Examples:
    """Tokens of a batch in their contexts, which are made of what counts alone, wherever padding stands."""
    window, before = like.tokens.shape[-1], like.before
    row, pos = at // batch.ids.shape[1], at % batch.ids.shape[1]
    order = jnp.argsort(
        ~batch.counted, axis=-1, stable=True
    )  # where the first, second, ... token that counts is
    rank = (jnp.cumsum(batch.counted, -1, dtype=jnp.int32) - 1)[row, pos]
    asked = rank[..., None] + jnp.arange(-before, window - before, dtype=jnp.int32)
    there = (asked >= 0) & (asked < batch.counted.sum(-1, dtype=jnp.int32)[row][..., None])
    place = order[row[..., None], jnp.clip(asked, 0, batch.ids.shape[1] - 1)]
    latent = jnp.arange(len(at), dtype=jnp.int32)[:, None]
    return Examples(
        batch.values[row, pos, latent],
        batch.first + row.astype(jnp.int32),
        pos.astype(jnp.int32),
        jnp.where(there, batch.ids[row[..., None], place], -1),
        jnp.where(there, batch.values[row[..., None], place, latent[..., None]], 0),
        before,
    )


def _tidy(found: Examples) -> Examples:
    """With nothing where a latent has no more tokens."""
    there = found.activation > 0
    number = lambda x: jnp.where(there if x.ndim == 2 else there[..., None], x, -1)
    return Examples(
        found.activation, number(found.text), number(found.pos), number(found.tokens),
        jnp.where(there[..., None], found.activations, 0), found.before,
    )  # fmt: skip
