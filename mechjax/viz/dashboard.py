"""All latents of a dictionary on one page: plots of all of them, and a list that can be sorted, filtered and opened."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechjax.base.errors import ArgumentError
from mechjax.dicteval.contexts import Contexts
from mechjax.viz.attributed import decimals
from mechjax.viz.feature_card import Pieces, card, log_counts, peaks, percent, pieces_of, plot, word
from mechjax.viz.heatmap import number
from mechjax.viz.html import Html, tag
from mechjax.viz.page import Page

_BINS = 40
_COLUMNS = (
    ("id", "latent", 1),
    ("density", "density", -1),
    ("largest", "largest", -1),
    ("near", "nearest", -1),
)


def dashboard(
    contexts: Contexts,
    tokenizer: Any,
    *,
    names: Mapping[int, str] | None = None,
    title: str = "A dictionary",
    n: int = 5,
    max_bytes: int = 5_000_000,
) -> Page:
    """A page about all latents that contexts were looked for.

    Args:
        contexts: What `mj.dicteval.contexts` found.
        tokenizer: The model's.
        names: What you call some of the latents.
        title: The page's heading.
        n: Contexts of each sort, and tokens of each side, that a latent's card shows.
        max_bytes: How large the list may grow; the page says what it leaves out.

    Raises:
        ArgumentError: Names of latents that are not there, or room for none.
    """
    known, names = contexts.latents.tolist(), dict(names or {})
    if strange := [i for i in names if i not in set(known)]:
        raise ArgumentError(
            f"names has latent {strange[0]}, which is not among the {len(known)} that contexts were looked for."
        )
    pieces = pieces_of(contexts, tokenizer)
    entries, size = [], 0
    for row in range(len(known)):
        entry = _entry(contexts, row, pieces, n, names, known)
        size += len(entry.encode())
        if size > max_bytes:
            break
        entries.append(entry)
    if not entries:
        raise ArgumentError(
            f"max_bytes={max_bytes}: not even one latent's card fits. Give some thousands for each."
        )
    left = len(known) - len(entries)
    omitted = (
        f"Shown are the first {len(entries):,} of {len(known):,} latents: more would make this list larger than "
        f"{max_bytes:,} bytes (`max_bytes`). Choose others with `contexts(..., latents=...)`."
    )
    where = tag("p", contexts.where, class_="eyebrow")
    head = [
        tag("div", where, tag("h1", title), class_="roomy"),
        _chips(contexts),
        tag("div", _plots(contexts), class_="plots roomy"),
    ]
    tools = tag(
        "div",
        tag(
            "input", type="search", placeholder="Filter by token, name or number", aria_label="Filter latents"
        ),
        tag("span", tag("span", str(len(entries)), class_="count", role="status"), " latents"),
        class_="tools",
    )
    body = [
        tools,
        tag("p", omitted, class_="fine") if left else None,
        _sorts(),
        tag("div", entries, class_="all"),
    ]
    return Page(title, Html("".join([*head, tag("section", body, class_="latents roomy")])), ("features",))


def _chips(contexts: Contexts) -> Html:
    """What is said of all of them in numbers."""
    density = np.asarray(contexts.density, np.float64)
    whole = len(density) == contexts.n_features
    chips = [
        (f"{len(density):,}", "latents" if whole else f"of {contexts.n_features:,} latents"),
        (f"{int(contexts.tokens):,}", "tokens looked at"),
        (f"{density.sum():.2f}", f"{'' if whole else 'of these '}active at a token, on average"),
        (f"{int((density == 0).sum()):,}", "never active here"),
    ]
    return tag("ul", [tag("li", tag("b", number), what) for number, what in chips], class_="chips roomy")


def _plots(contexts: Contexts) -> list[Html]:
    """How densities, sizes and nearest cosines lie."""
    power = lambda x: f"{10.0**x:g}"
    counts, low, high = log_counts(np.asarray(contexts.density, np.float64), _BINS)
    sizes, small, large = log_counts(np.asarray(contexts.largest, np.float64), _BINS)
    found = [
        plot(
            counts,
            "Density: part of tokens, by its logarithm",
            *(f"{10.0 ** (x + 2):g}%" for x in (low, high)),
        ),
        plot(sizes, "Largest activation, by its logarithm", power(small), power(large)),
    ]
    if contexts.near is not None:
        cosines = np.asarray(contexts.near.cosine[:, 0], np.float64)
        near = np.histogram(np.clip(cosines, 0, 1), _BINS, (0, 1))[0]
        found.append(plot(near, "Cosine of the latent that writes most alike", "0", "1"))
    return found


def _sorts() -> Html:
    """The heads of the columns, by which the list is sorted."""
    button = lambda by, text, way, kind: tag(
        "button", text, type="button", data_by=by, data_first=way, aria_pressed="true" if by == "id" else "false",
        data_way=1 if by == "id" else None, class_=kind,
    )  # fmt: skip
    (first, *rest) = _COLUMNS
    heads = [
        button(*first, None),
        tag("span", "strongest at"),
        tag("span", "speaks for"),
        *(button(*column, "num") for column in rest),
    ]
    return tag("div", heads, class_="row sorts")


def _entry(
    contexts: Contexts, row: int, pieces: Pieces, n: int, names: Mapping[int, str], linked: list[int]
) -> Html:
    """One latent: a line, and its card under it."""
    latent, density = int(contexts.latents[row]), float(contexts.density[row])
    largest = float(contexts.largest[row])
    near = None if contexts.near is None else float(contexts.near.cosine[row, 0])
    tops = peaks(contexts, row, pieces) if density else []
    ids = [] if contexts.lens is None else contexts.lens.promoted_tokens[row].tolist()[:n]
    says = [word(pieces[int(i)]) for i in ids]
    strongest = " · ".join(text for text, _ in tops)
    name = names.get(latent)
    line = tag(
        "div",
        tag("span", latent, class_="id"),
        tag("span", tag("em", name, ": ") if name else None, strongest or "–"),
        tag("span", " · ".join(says[:4]), class_="says"),
        tag("span", percent(density), class_="num"),
        tag("span", number(largest, decimals(largest)), class_="num"),
        tag("span", "–" if near is None else f"{near:.2f}", class_="num"),
        class_="row",
    )
    words = [str(latent), name or "", strongest, *says]
    return tag(
        "details",
        tag("summary", line),
        card(contexts, row, pieces, n=n, linked=linked),
        class_="latent", id=f"l{latent}", data_id=latent, data_density=f"{density:.3g}", data_largest=f"{largest:.4g}",
        data_near=f"{near or 0:.3f}", data_find=" ".join(words).lower(),
    )  # fmt: skip
