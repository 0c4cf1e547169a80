"""Folders in other libraries' layouts: those that mechjax wrote, with its list of checksums, and any model's."""

import hashlib
import re
from pathlib import Path
from typing import Any

from mechjax.artefacts.found import File, Found, compared, made_of, size_of, told
from mechjax.base.digests import file_digest
from mechjax.base.errors import CheckpointError
from mechjax.base.signed import unsigned
from mechjax.hub.folder import CONFIG, INDEX, WEIGHTS, Checkpoint, inside, read_config, read_index
from mechjax.hub.listing import FORMAT, LISTING

_LARGE, _SMALL = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def is_listed(path: Path) -> bool:
    """Whether mechjax wrote the folder, and listed what is in it."""
    return (path / LISTING).is_file()


def check_listed(path: Path) -> Found:
    """Compare every file with the list, and the list with its own checksum."""
    size = size_of(path / LISTING)
    try:
        page = unsigned((path / LISTING).read_bytes())
    except (OSError, ValueError) as error:
        return Found((File(LISTING, size, str(error)),))
    if page.get("format") != FORMAT:
        return Found(
            (
                File(
                    LISTING, size, f"has the format {page.get('format')!r}, and this mechjax reads {FORMAT!r}"
                ),
            )
        )
    files: dict[str, Any] = page["files"]
    found = [compared(path, name, sums, sums.get("crc32")) for name, sums in files.items()]
    made, notes = made_of(page)
    more = {file.name for file in path.iterdir() if file.is_file()} - {LISTING, *files}
    notes += (f"not listed, so not compared: {', '.join(sorted(more)[:5])}",) if more else ()
    return Found((File(LISTING, size), *found), made, notes)


def is_model(path: Path) -> bool:
    """Whether a model lies there that nobody listed."""
    weights = any((path / name).is_file() for name in (WEIGHTS, INDEX))
    return not is_listed(path) and (path / CONFIG).is_file() and weights


def check_model(path: Path) -> Found:
    """Whether config, index and headers agree, and files of the Hub's cache have the checksum that is their name."""
    single = (path / WEIGHTS).is_file()
    problems: dict[str, str] = {}
    try:
        read_config(path)
    except CheckpointError as error:
        problems[CONFIG] = told(error, path)
    try:
        shards = [WEIGHTS] if single else sorted(set(read_index(path).values()))
    except CheckpointError as error:
        shards, problems[INDEX] = [], told(error, path)
    try:
        if shards:
            Checkpoint(path)
    except CheckpointError as error:
        blamed = next((name for name in shards if name in str(error)), WEIGHTS if single else INDEX)
        problems[blamed] = told(error, path)
    names = [CONFIG, *([] if single else [INDEX]), *shards]
    files = [File(name, size_of(path / name), problems.get(name, "")) for name in names]
    by_name = [_by_name(path, file) for file in files]
    summed = all(known for _, known in by_name)
    notes = (
        () if summed else ("no checksums of all of these files are known: sizes, config and headers agree",)
    )
    return Found(tuple(file for file, _ in by_name), (), () if problems else notes, summed)


def _by_name(path: Path, file: File) -> tuple[File, bool]:
    """A file of the Hub's cache, which is called by its checksum, compared with it; and whether it is one."""
    try:
        target = inside(path, file.name)
    except CheckpointError as error:
        return File(file.name, file.size, told(error, path)), False
    if file.problem or target.parent.name != "blobs" or not target.is_file():
        return file, False
    if _LARGE.fullmatch(target.name):
        right = file_digest(target) == target.name
    elif _SMALL.fullmatch(target.name):  # as git names what it keeps
        data = target.read_bytes()
        right = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == target.name
    else:
        return file, False
    return File(
        file.name, file.size, "" if right else "was changed: it does not have the checksum it is called by"
    ), True
