"""YAML of the plainest kind: `key: text` lines, and lists of text below a key. Anything else is refused.

That is what configs of circuit-tracer are, and a parser of all of YAML is a dependency that nothing else here needs.
"""

import re
from pathlib import Path

from mechjax.base.errors import CheckpointError

LARGEST_YAML = 1 << 20  # bytes
_KEY = re.compile(r"([A-Za-z_][\w-]*):(?:[ \t]+(.*))?")
_ITEM = re.compile(r"[ \t]*-[ \t]+(.*)")
_SPECIAL = tuple("[]{}&*!|>%@`?,")  # a plain text that begins so is another thing in YAML


def read_flat_yaml(path: Path) -> dict[str, str | list[str]]:
    """The keys of the file with their text or lists of text; numbers and nulls stay text.

    Raises:
        CheckpointError: Missing, too large, or YAML of another kind.
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise CheckpointError(
                f"`{path}` is larger than {LARGEST_YAML >> 20} MiB; no such config is genuine."
            )
        lines = path.read_text("utf-8").splitlines()
    except CheckpointError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"Cannot read `{path}`: {error}.") from None
    found: dict[str, str | list[str]] = {}
    key: str | None = None
    for number, line in enumerate(lines, 1):
        where = f"line {number} of `{path}`"
        if not line.strip() or line.lstrip().startswith("#") or line.rstrip() == "---":
            continue
        if (item := _ITEM.fullmatch(line)) and key is not None:
            held = found[key] or []
            if not isinstance(held, list):
                raise CheckpointError(f"{where} puts an item below `{key}`, which has a value already.")
            found[key] = [*held, _text(item[1], where)]
        elif pair := _KEY.fullmatch(line):
            key = str(pair[1])
            if key in found:
                raise CheckpointError(f"{where} has the key `{key}` a second time.")
            found[key] = _text(pair[2] or "", where)
        else:
            raise CheckpointError(
                f"{where} is `{line[:60]}`; mechjax reads `key: text` and lists of text only. Write it so."
            )
    return found


def _text(value: str, where: str) -> str:
    """A plain or quoted text."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        inner = value[1:-1]
        if "\\" not in inner and value[0] not in inner:
            return inner
    elif not value.startswith((*_SPECIAL, "'", '"')) and ": " not in value:
        return re.sub(r"[ \t]+#.*", "", value)
    raise CheckpointError(f"{where} holds `{value[:60]}`; mechjax reads plain or simply quoted text only.")
