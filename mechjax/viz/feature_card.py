"""What one latent of a dictionary stands for: its contexts, shaded by its activation, and what else is known of it."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from mechjax.base.errors import ArgumentError
from mechjax.dicteval.contexts import Contexts, Examples
from mechjax.viz.attributed import decimals, figure
from mechjax.viz.heatmap import number
from mechjax.viz.html import Html, tag
from mechjax.viz.page import Page

_SHADES = 9
_WIDE, _HIGH = 240, 60  # of a histogram's drawing

Pieces = Mapping[int, str]


def feature_card(
    contexts: Contexts, latent: int, tokenizer: Any, *, name: str | None = None, note: str = ""
) -> Page:
    """A page about one latent.

    Args:
        contexts: What `mj.dicteval.contexts` found.
        latent: Which latent, by its number in the dictionary.
        tokenizer: The model's.
        name: What you call it.
        note: A sentence to set under its name.

    Raises:
        ArgumentError: A latent that contexts were not looked for.
    """
    row = row_of(contexts, latent)
    title = f"Latent {latent}" if name is None else f"Latent {latent}: {name}"
    head = [tag("p", contexts.where, class_="eyebrow"), tag("h1", title), tag("p", note) if note else None]
    told = tag("p", described(contexts, row), class_="lede")
    body = card(contexts, row, pieces_of(contexts, tokenizer), n=contexts.strongest.activation.shape[1])
    return Page(title, Html("".join(part for part in (*head, told, body) if part)), ("features",))


def row_of(contexts: Contexts, latent: int) -> int:
    """Where a latent stands in a record of contexts.

    Raises:
        ArgumentError: Nowhere.
    """
    known = contexts.latents.tolist()
    if latent not in known:
        raise ArgumentError(
            f"latent {latent} is not among the {len(known)} that contexts were looked for, of {contexts.n_features}: "
            f"`contexts(..., latents=[{latent}])` looks for those of this one."
        )
    return known.index(latent)


def pieces_of(contexts: Contexts, tokenizer: Any) -> Pieces:
    """The text of every token that is shown, with a space before words where the tokenizer's pieces have none.

    Line breaks and tabs are drawn.
    """
    held = [contexts.strongest.tokens, contexts.sample.tokens]
    if contexts.lens is not None:
        held += [contexts.lens.promoted_tokens, contexts.lens.suppressed_tokens]
    ids = np.unique(np.concatenate([np.asarray(x).ravel() for x in held]))
    ids = ids[ids >= 0]
    texts = tokenizer.str_tokens(ids) if len(ids) else []
    gap = "" if any(text.startswith(" ") for text in texts) else " "
    drawn = lambda text: text.replace("\n", "↵").replace("\t", "⇥") or "∅"
    return {int(i): gap + drawn(text) for i, text in zip(ids, texts, strict=True)}


def described(contexts: Contexts, row: int) -> str:
    """How often a latent is active, and how strongly, in a sentence."""
    if not contexts.density[row] > 0:
        return f"Never active in {int(contexts.tokens):,} tokens."
    mean, largest = (figure(float(x[row])).lstrip("+") for x in (contexts.mean, contexts.largest))
    return (
        f"Active at {percent(float(contexts.density[row]))} of {int(contexts.tokens):,} tokens; there its activation "
        f"is {mean} on average, and at most {largest}."
    )


def word(piece: str) -> str:
    """A token by itself."""
    return piece.strip(" ") or "␣"


def percent(share: float) -> str:
    """A share with two digits: 3.1%, 0.024%."""
    return f"{100 * share:.{max(0, 1 - math.floor(math.log10(100 * share)))}f}%" if share else "0%"


def card(contexts: Contexts, row: int, pieces: Pieces, *, n: int, linked: Sequence[int] = ()) -> Html:
    """What is known of one latent, without its name.

    Args:
        contexts: The record.
        row: Where the latent stands in it.
        pieces: What tokens look like.
        n: How many contexts of each sort.
        linked: Latents of the same page.
    """
    if not contexts.density[row] > 0:
        return tag("p", "It is never active in these texts.", class_="none")
    largest = float(contexts.largest[row])
    counts = np.asarray(contexts.histogram[row])
    known = np.flatnonzero(np.asarray(contexts.sample.activation[row]) > 0)
    spread = known[np.unique(np.linspace(0, len(known) - 1, min(n, len(known))).round().astype(int))]
    facts = [
        plot(counts, "Activations, where there is one", "0", number(largest, decimals(largest))),
        *_spoken(contexts, row, pieces, n),
    ]
    return tag(
        "div",
        tag("div", facts, class_="facts"),
        _examples(contexts.strongest, row, range(n), pieces, largest, "Strongest"),
        _examples(contexts.sample, row, spread, pieces, largest, "Down the range, evenly"),
        _near(contexts, row, linked),
        class_="inside",
    )


def plot(counts: Int[np.ndarray, " bin"], caption: str, low: str, high: str, middle: str = "") -> Html:
    """A histogram; every bar that holds anything can be seen."""
    most, step = max(int(counts.max(initial=0)), 1), _WIDE / max(len(counts), 1)
    heights = [0.0 if not c else max(1.5, _HIGH * int(c) / most) for c in counts]
    bars = "".join(
        f"M{i * step:.1f} {_HIGH}v{-h:.1f}h{step - 0.6:.1f}v{h:.1f}z" for i, h in enumerate(heights) if h
    )
    drawing = tag(
        "svg", tag("path", d=bars), viewBox=f"0 0 {_WIDE} {_HIGH}", preserveAspectRatio="none", role="img",
        aria_label=f"{caption}: {low} to {high}, at most {most:,} in one bar",
    )  # fmt: skip
    words = tag("div", tag("span", low), tag("span", middle), tag("span", high))
    return tag("figure", tag("figcaption", caption), drawing, words, class_="plot")


def _spoken(contexts: Contexts, row: int, pieces: Pieces, n: int) -> list[Html]:
    """The tokens that a latent speaks for and against."""
    lens = contexts.lens
    if lens is None:
        return []
    sides = ((lens.promoted, lens.promoted_tokens, "Speaks for"),
             (lens.suppressed, lens.suppressed_tokens, "Speaks against"))  # fmt: skip
    full = max(float(np.abs(np.asarray(x[row])).max(initial=0)) for x, _, _ in sides) or 1.0
    digits = decimals(full) + 1
    return [
        tag(
            "table",
            tag("caption", caption),
            [
                tag(
                    "tr",
                    tag("td", word(pieces[int(i)]), style=f"--v:{abs(v) / full:.2f}"),
                    tag("td", "+" * (v > 0) + number(v, digits)),
                    class_="n" if v < 0 else None,
                )
                for v, i in zip(
                    np.asarray(values[row])[:n].tolist(), np.asarray(ids[row])[:n].tolist(), strict=True
                )
            ],
            class_="speaks",
        )
        for values, ids, caption in sides
    ]


def _examples(
    examples: Examples, row: int, which: Sequence[int] | range | Int[np.ndarray, " k"], pieces: Pieces, largest: float,
    caption: str,
) -> Html | None:  # fmt: skip
    """Tokens in their contexts, one under the other."""
    activation, ids, values = (
        np.asarray(x[row]) for x in (examples.activation, examples.tokens, examples.activations)
    )
    lines, digits = [], decimals(largest)
    for j in which:
        if not activation[j] > 0:
            continue
        words = [
            _word(int(i), float(v), largest, digits, pieces) for i, v in zip(ids[j], values[j], strict=True)
        ]
        before, after = words[: examples.before], words[examples.before + 1 :]
        started = not before or ids[j][0] < 0
        lines.append(
            tag(
                "tr",
                tag("td", number(float(activation[j]), digits)),
                tag("td", tag("div", tag("span", None if started else tag("u", "…"), before))),
                tag("td", tag("b", words[examples.before]), after),
            )
        )
    return tag("table", tag("caption", caption), lines, class_="kwic") if lines else None


def _word(token: int, value: float, largest: float, digits: int, pieces: Pieces) -> Html | str | None:
    """A token, shaded where the latent is active."""
    if token < 0:
        return None
    text = pieces[token]
    if not value > 0:
        return text
    shade = max(1, math.ceil(_SHADES * min(value / largest, 1.0)))
    lead = text[: len(text) - len(text.lstrip(" "))]
    return Html(lead + tag("i", text[len(lead) :], class_=f"v{shade}", data_tip=number(value, digits)))


def _near(contexts: Contexts, row: int, linked: Sequence[int]) -> Html | None:
    """Latents that write alike."""
    if contexts.near is None:
        return None
    shown = set(linked)
    found = [
        (
            tag("a" if i in shown else "span", f"{i} ({cosine:.2f})", href=f"#l{i}" if i in shown else None),
            " ",
        )
        for i, cosine in zip(
            contexts.near.nearest[row].tolist(), contexts.near.cosine[row].tolist(), strict=True
        )
    ]
    return tag("p", "Writes most like (cosine): ", found, class_="near")


def peaks(contexts: Contexts, row: int, pieces: Pieces, n: int = 3) -> list[tuple[str, int]]:
    """The tokens that its strongest contexts are of, with how many are, the most frequent first."""
    ids = np.asarray(contexts.strongest.tokens[row, :, contexts.strongest.before])
    return [(word(pieces[i]), c) for i, c in Counter(int(i) for i in ids if i >= 0).most_common(n)]


def log_counts(
    values: Float[np.ndarray, " feature"], bins: int
) -> tuple[Int[np.ndarray, " bin"], float, float]:
    """A histogram of the decimal logarithms of what is above 0, with its ends."""
    logs = np.log10(values[values > 0])
    if not len(logs):
        return np.zeros(bins, int), 0.0, 0.0
    low, high = math.floor(logs.min()), math.ceil(logs.max())
    high = high if high > low else low + 1
    return np.histogram(logs, bins, (low, high))[0], float(low), float(high)
