"""Single files of JSON that carry a checksum: circuits in MIB's form, and the scoreboard's rows."""

import json
from pathlib import Path
from typing import Any

from mechjax.artefacts.found import File, Found, made_of, size_of
from mechjax.base.signed import unsigned

SCOREBOARD = Path("results") / "scoreboard.json"


def is_circuit(path: Path) -> bool:
    """Whether a file is a circuit in MIB's form, whole or not."""
    if path.suffix != ".json" or not path.is_file():
        return False
    with path.open("rb") as file:
        return b'"cfg"' in (head := file.read(4096)) or b'"n_layers"' in head


def check_circuit(path: Path) -> Found:
    """Compare a circuit's file with its checksum."""
    return _checked(path, path.name)


def is_scoreboard(path: Path) -> bool:
    """Whether a scoreboard lies there."""
    return (path / SCOREBOARD).is_file()


def check_scoreboard(path: Path) -> Found:
    """Compare the scoreboard's rows with their checksum."""
    return _checked(path / SCOREBOARD, SCOREBOARD.as_posix())


def _checked(path: Path, name: str) -> Found:
    data, size = path.read_bytes(), size_of(path)
    try:
        page = unsigned(data)
    except ValueError as error:
        if _has_no_sum(data):
            note = "it has no checksum: another library or an older mechjax wrote it"
            return Found((File(name, size),), (), (note,), summed=False)
        return Found((File(name, size, str(error)),))
    made, notes = made_of(page)
    return Found((File(name, size),), made, notes)


def _has_no_sum(data: bytes) -> bool:
    """Whether it is whole JSON of somebody who wrote no checksum."""
    try:
        page: Any = json.loads(data)
    except (ValueError, RecursionError):
        return False
    if isinstance(page, list):  # rows alone, as scoreboards were written
        return True
    return isinstance(page, dict) and set(page) == {"cfg", "nodes", "edges"}
