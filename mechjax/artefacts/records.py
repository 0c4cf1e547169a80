"""Records that `mj.save` wrote."""

import re
from pathlib import Path
from typing import Any

from mechjax.artefacts.found import File, Found, compared, made_of, size_of, told
from mechjax.base.errors import CheckpointError
from mechjax.base.records import PAGE, read_page

_ARRAYS = re.compile(r"[0-9a-f]{64}\.safetensors")


def fits(path: Path) -> bool:
    """Whether a record lies there, or the arrays of one that has lost its page."""
    return (path / PAGE).is_file() or bool(_arrays(path))


def check(path: Path) -> Found:
    """Compare `record.json` with its own checksum, and the arrays' file with the one in it."""
    page: dict[str, Any] = {}
    problem = "" if (path / PAGE).is_file() else "is missing"
    try:
        page = read_page(path)
    except CheckpointError as error:
        problem = problem or told(error, path)
    names = [f"{page['arrays']}.safetensors"] if page else _arrays(path)
    wanted = lambda name: {"sha256": name.removesuffix(".safetensors")}
    files = [compared(path, name, wanted(name), page.get("crc32")) for name in names]
    made, notes = made_of(page) if page else ((), ())
    stale = set(_arrays(path)) - set(names)
    notes += (f"{len(stale)} files of arrays belong to no record any more",) if stale else ()
    return Found((File(PAGE, size_of(path / PAGE), problem), *files), made, notes)


def _arrays(path: Path) -> list[str]:
    return sorted(file.name for file in path.glob("*.safetensors") if _ARRAYS.fullmatch(file.name))
