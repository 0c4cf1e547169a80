"""JSON that carries a checksum of itself.

The checksum is of what the page says, so it does not hang on the order of keys. Text can say the same in other bytes
(`1e-5` and `1E-5`), so a page is also compared with the one text that says it in its layout: no bit of it can change
unnoticed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

Layout = Literal["compact", "indented", "lines"]
_KEY = "sha256"


def signed(page: Mapping[str, Any], layout: Layout = "compact") -> bytes:
    """The text of a page with its checksum.

    Args:
        page: What it says, as JSON; numbers are finite.
        layout: All in one line, or indented, or a line for each key and for each item of a list under a key.
    """
    return _LAYOUTS[layout]({**page, _KEY: page_digest(page)}).encode()


def unsigned(data: bytes) -> dict[str, Any]:
    """What a text that `signed` made says.

    Raises:
        ValueError: It is no JSON ("is not whole"), or is not what was written ("was changed"); the message says which.
    """
    try:
        page = json.loads(data)
    except RecursionError:
        raise ValueError("is not whole: it nests too deeply") from None
    except ValueError as error:
        raise ValueError(f"is not whole: {error}") from None
    if not isinstance(page, dict):
        raise ValueError(f"is not whole: it holds a {type(page).__name__} where an object was expected")
    if not any(text(page).encode() == data for text in _LAYOUTS.values()):
        raise ValueError("was changed after it was written: its text is none that mechjax writes")
    if page.pop(_KEY, None) != page_digest(page):
        raise ValueError("was changed after it was written: its checksum differs")
    return page


def page_digest(page: Mapping[str, Any]) -> str:
    """The checksum of what a page says."""
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def _lines(page: Mapping[str, Any]) -> str:
    """A line for each key, and for each item of a list under a key."""

    def told(value: Any) -> str:
        if not isinstance(value, list) or not value:
            return json.dumps(value, allow_nan=False)
        return "[\n" + ",\n".join(json.dumps(item, allow_nan=False) for item in value) + "\n]"

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {told(value)}" for key, value in page.items()) + "\n}\n"


_LAYOUTS: dict[Layout, Callable[[Mapping[str, Any]], str]] = {
    "compact": lambda page: json.dumps(page, allow_nan=False),
    "indented": lambda page: json.dumps(page, indent=1, allow_nan=False),
    "lines": _lines,
}
