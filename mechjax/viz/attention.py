"""What a head looks at: the sentence shaded by attention, and the whole pattern as a table below it.

The shaded sentence is one row of the table. Choosing another token shows that token's row; the script reads the
numbers from the table, so there is one copy of them.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Float

from mechjax.base.errors import ShapeError
from mechjax.viz.heatmap import cell, number, shade
from mechjax.viz.html import Html, tag


def tokens_line(
    tokens: Sequence[str], roles: Mapping[int, str] | None = None, after: Html | None = None
) -> Html:
    """A sentence, token by token, with the roles of some of them written underneath, and what comes after it."""
    roles = roles or {}
    spans = [
        tag("span", shown(token), role and tag("small", role), class_="tok role" if role else "tok")
        for token, role in ((token, roles.get(i)) for i, token in enumerate(tokens))
    ]
    return tag("p", spans, after and (tag("span", "→", class_="to"), after), class_="tokens")


def shown(token: str) -> str:
    """A token as it can be seen: without its leading space, line breaks as arrows."""
    return token.removeprefix(" ").replace("\n", "↵").replace("\t", "⇥") or "␣"


def attention(
    pattern: Float[Array, "query key"] | Float[np.ndarray, "query key"],
    tokens: Sequence[str],
    *,
    title: str,
    note: str = "",
    query: int = -1,
) -> Html:
    """One head's attention pattern on one sentence.

    Args:
        pattern: How much each query position attends to each key position; rows sum to one. Shape (query, key).
        tokens: The sentence, one string per position.
        title: The head's name.
        note: One sentence about it.
        query: The position whose attention is shown first; negative counts from the end.

    Raises:
        ShapeError: The tokens do not fit the pattern.
    """
    numbers = np.asarray(pattern, np.float64)
    if numbers.shape != (len(tokens), len(tokens)):
        raise ShapeError(
            f"a pattern of shape (query, key) = {numbers.shape} was given {len(tokens)} tokens: give one per position."
        )
    query %= len(tokens)
    names = [shown(token) for token in tokens]
    buttons = []
    for k, name in enumerate(names):
        share, chosen = float(numbers[query, k]), k == query
        classes = "tok" + (" from" if chosen else "") + shade(share)
        tip, pressed = f"{names[query]} → {name}: {number(share)}", "true" if chosen else "false"
        buttons.append(
            tag(
                "button",
                name,
                type="button",
                class_=classes,
                style=f"--v:{share:.3f}",
                data_tip=tip,
                aria_pressed=pressed,
            )
        )
    line = tag("p", buttons, class_="tokens look", role="group", aria_label=f"Attention of {title}")
    head = tag("figcaption", tag("b", title), " ", note)
    return tag("figure", head, line, _whole(numbers, names, title), class_="attention")


def _whole(numbers: Float[np.ndarray, "query key"], names: Sequence[str], title: str) -> Html:
    heads = [tag("th", tag("span", name), scope="col") for name in names]
    lines = []
    for q, (name, row) in enumerate(zip(names, numbers, strict=True)):
        cells = [
            # What comes later cannot be seen: it stands there only to be read.
            cell(share, 1.0, f"{name} → {names[k]}: {number(share)}", quiet=k > q and share == 0.0)
            for k, share in enumerate(map(float, row))
        ]
        lines.append(tag("tr", tag("th", name, scope="row"), cells))
    top = tag("thead", tag("tr", tag("td", class_="corner"), heads))
    table = tag(
        "table", top, tag("tbody", lines), class_="heat dense", aria_label=f"Attention pattern of {title}"
    )
    what = tag(
        "p",
        "Each row is a word, and says how its attention is shared out over the words before it.",
        class_="fine",
    )
    return tag("details", tag("summary", "the whole pattern"), what, tag("div", table, class_="scroll"))
