"""JSON from files that nobody vouches for: one object, no key twice, bounded size, typed errors."""

import json
from pathlib import Path
from typing import Any

from mechjax.base.errors import CheckpointError

LARGEST_JSON = 100 << 20  # bytes; the safetensors format caps its headers at the same size


def parse_object(text: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object in `text`; `what` names it in errors.

    Raises:
        CheckpointError: Not JSON, not an object, nested beyond Python's stack, or a key stands twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            twice = next(key for key in names if names.count(key) > 1)
            raise CheckpointError(f"{what} has the key `{twice}` twice, so which one counts is undefined.")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise CheckpointError(f"{what} nests JSON too deeply to be genuine.") from None
    except CheckpointError:
        raise
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, an integer of thousands of digits
        raise CheckpointError(f"{what} is not valid JSON: {error}. Download or write it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}; an object was expected.")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        CheckpointError: The file is missing, larger than 100 MiB, or not one valid JSON object.
    """
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise CheckpointError(
                f"`{path}` is larger than {LARGEST_JSON >> 20} MiB; no such file is genuine."
            )
        return parse_object(path.read_bytes(), f"`{path}`")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot read `{path}`: {error.strerror or error}.") from None
