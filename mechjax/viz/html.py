"""HTML that cannot be injected into: text is escaped unless this module made it.

`tag("td", token, title=token)` escapes both; only `Html`, which `tag` returns, passes through as it is.
"""

import html
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Markup that is safe to put into a page as it stands."""

    __slots__ = ()


_EMPTY = ("br", "hr", "img", "input", "link", "meta")  # those of HTML; in SVG every element is closed

Child = str | int | float | None | Iterable[Any]


def escape(child: Child) -> Html:
    """A child as markup: `Html` as it is, None as nothing, a list piece by piece, anything else escaped."""
    if isinstance(child, Html):
        return child
    if child is None:
        return Html("")
    if isinstance(child, (str, int, float)):
        return Html(html.escape(str(child), quote=True))
    return Html("".join(escape(one) for one in child))


def tag(name: str, *children: Child, **attributes: str | int | float | bool | None) -> Html:
    """An element. Attribute names lose a trailing underscore and `_` is written `-`; None and False leave one out."""
    words = [name]
    for key, value in attributes.items():
        spelled = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(spelled)
        elif value is not None and value is not False:
            words.append(f'{spelled}="{html.escape(str(value), quote=True)}"')
    opened = f"<{' '.join(words)}>"
    return Html(opened if name in _EMPTY else f"{opened}{escape(children)}</{name}>")
