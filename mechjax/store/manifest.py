"""`manifest.json`: what a store holds, and the one word on which of its rows count.

It is replaced in one step after the rows that it speaks of are on disk, so whoever reads finds all of them or does not
know of them. It carries a checksum of itself. Nothing in it names a file: where rows lie follows from the numbers of
columns and shards alone.
"""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mechjax.base.atomic import replace_file
from mechjax.base.errors import ArgumentError, CheckpointError, WriteError
from mechjax.base.provenance import Provenance, Source, placed, provenance_of, read_provenance
from mechjax.base.signed import page_digest, signed, unsigned
from mechjax.hub.json_files import read_object
from mechjax.store.moments import Moments
from mechjax.store.rows import NUMPY, Column
from mechjax.store.source import Position

NotFinite = Literal["abort", "skip"]
DTYPES = tuple(NUMPY)
NAME = "manifest.json"
_FORMAT, _VERSION = "mechjax store", 1
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Specification:
    """What is stored, and of what. Writing goes on only with the same.

    Attributes:
        columns: Sites at layers.
        dtype: Of the rows.
        shard_rows: Rows of each shard but the last.
        chunk_rows: Rows that have one checksum, and are the least that is read.
        rows: After how many rows it ends; None at the end of the prompts.
        skip_first: Whether the first real token of each text is left out.
        not_finite: What is done with rows that are not finite.
        config: Checksum of the model's choices.
        weights: Checksum of its weights.
        tokenizer: Checksum of the tokenizer, where one was given.
        source: What the prompts are, as whoever wrote it says.
    """

    columns: tuple[Column, ...]
    dtype: str
    shard_rows: int
    chunk_rows: int
    rows: int | None
    skip_first: bool
    not_finite: NotFinite
    config: str
    weights: str
    tokenizer: str | None
    source: str | None


@dataclass(frozen=True)
class Shard:
    """Rows that were written together.

    Attributes:
        rows: How many.
        sha256: Of the rows of each column.
        sizes: Of the file of each column, in bytes.
        end: The place in the prompts behind the last row.
    """

    rows: int
    sha256: tuple[str, ...]
    sizes: tuple[int, ...]
    end: Position


@dataclass(frozen=True)
class Manifest:
    """A store.

    Attributes:
        specification: What is stored, and of what.
        begin: Where the prompts were at the start.
        shards: What is written.
        moments: Of each column, over all rows.
        skipped: Rows that were left out as not finite.
        complete: Whether it was written to its end.
        made: Where it comes from; several where writing went on with other code, packages or devices.
    """

    specification: Specification
    begin: Position
    shards: tuple[Shard, ...]
    moments: tuple[Moments, ...]
    skipped: int
    complete: bool
    made: tuple[Provenance, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def end(self) -> Position:
        """The place in the prompts behind what is written."""
        return self.start_of(len(self.shards))

    def start_of(self, shard: int) -> Position:
        """The place in the prompts where a shard begins."""
        return self.shards[shard - 1].end if shard else self.begin

    @property
    def digest(self) -> str:
        """A checksum of all rows, and of what they are."""
        return page_digest(
            {"specification": asdict(self.specification), "rows": [x.sha256 for x in self.shards]}
        )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest in the place of the last one, in one step.

    Raises:
        WriteError: The folder cannot be written.
    """
    moments = [
        {"count": x.count, "mean": x.mean.tolist(), "squares": x.squares.tolist()} for x in manifest.moments
    ]
    page: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        "complete": manifest.complete,
        "rows": manifest.rows,
        "skipped": manifest.skipped,
        "specification": asdict(manifest.specification),
        "begin": asdict(manifest.begin),
        "shards": [asdict(shard) for shard in manifest.shards],
        "moments": moments,
        "provenance": [made.page() for made in manifest.made],
    }
    try:
        replace_file(folder / NAME, signed(page))
    except OSError as error:
        raise WriteError(f"cannot write `{folder / NAME}`: {error.strerror or error}.") from error


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        CheckpointError: The folder is no store, or one of another version, or its manifest is not whole.
    """
    path = folder / NAME
    if not path.is_file():
        raise CheckpointError(
            f"`{folder}` is no store of activations: it has no `{NAME}`. Give the folder that "
            "`mechjax.store.write` wrote."
        )
    page = read_object(path)
    if page.get("format") != _FORMAT or type(page.get("version")) is not int:
        raise CheckpointError(f"`{path}` is not that of a store of activations: `format` is not {_FORMAT!r}.")
    if page["version"] != _VERSION:
        raise CheckpointError(
            f"`{folder}` is a store of version {page['version']}, and this mechjax reads version {_VERSION}: read it "
            "with the mechjax that wrote it, or a newer one."
        )
    try:
        page = unsigned(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"`{path}` {error}. Bring it back from a copy, or write the store again in another folder."
        ) from None
    try:
        return _manifest(page)
    except _WrongError as error:
        raise CheckpointError(f"`{path}` contradicts itself: {error}.") from None


def check_same(folder: Path, found: Specification, wanted: Specification) -> None:
    """Whether two specifications are the same.

    Raises:
        ArgumentError: They differ; the message says in what.
    """
    there, here = asdict(found), asdict(wanted)
    told = lambda value: text if len(text := _told(value)) < 81 else f"{text[:77]}...{text[-1]}"
    differs = [
        f"`{name}` is {told(there[name])} there and {told(here[name])} here"
        for name in here
        if there[name] != here[name]
    ]
    if differs:
        raise ArgumentError(
            f"`{folder}` is another store: {'; '.join(differs)}. Go on with what it was begun with, or choose another "
            "folder."
        )


def _told(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(str(Column(**column)) for column in value)
    if isinstance(value, str) and _SHA256.fullmatch(value):
        return f"that of checksum {value[:12]}"
    return json.dumps(value)


def made_here(said: Specification, model: Any, made: tuple[Provenance, ...] = ()) -> tuple[Provenance, ...]:
    """Where a store comes from once this process has written to it."""
    tokenizer = () if said.tokenizer is None else (Source("tokenizer", "Tokenizer", digest=said.tokenizer),)
    here = replace(provenance_of(), made_from=(placed("model", model, said.weights), *tokenizer))
    return made if made and made[-1] == here else (*made, here)


class _WrongError(ValueError):
    """A manifest that no version of mechjax writes, though its checksum is right."""


def _get(page: Any, name: str, *kinds: type, low: int = 0) -> Any:
    """The entry of a name, of one of some types; numbers are not below `low`."""
    value: Any = page.get(name, _WrongError) if isinstance(page, dict) else _WrongError
    if type(value) not in kinds or (type(value) is int and value < low):
        raise _WrongError(f"`{name}` is {value!r:.60}")
    return value


def _manifest(page: dict[str, Any]) -> Manifest:
    said = _specification(_get(page, "specification", dict))
    widths = [column.width for column in said.columns]
    shards = tuple(_shard(shard, said) for shard in _get(page, "shards", list))
    complete, moments = _get(page, "complete", bool), _get(page, "moments", list)
    whole = [shard.rows == said.shard_rows for shard in shards]
    if not all(whole[:-1]) or (not complete and not all(whole)) or len(moments) != len(widths):
        raise _WrongError("its shards are not what its specification says")
    gathered = tuple(_moments(x, width) for x, width in zip(moments, widths, strict=True))
    begin = _position(_get(page, "begin", dict))
    made = tuple(map(read_provenance, _get({"provenance": [], **page}, "provenance", list)))
    found = Manifest(said, begin, shards, gathered, _get(page, "skipped", int), complete, made)
    if found.rows != _get(page, "rows", int) or any(x.count != found.rows for x in gathered):
        raise _WrongError("its shards have other numbers of rows than it says")
    return found


def _specification(page: dict[str, Any]) -> Specification:
    columns = tuple(
        Column(_get(x, "site", str), _get(x, "layer", int, type(None)), _get(x, "width", int, low=1))
        for x in _get(page, "columns", list)
    )
    shard, chunk = (_get(page, name, int, low=1) for name in ("shard_rows", "chunk_rows"))
    dtype, not_finite = _get(page, "dtype", str), _get(page, "not_finite", str)
    if shard % chunk or dtype not in DTYPES or not_finite not in ("abort", "skip") or not columns:
        raise _WrongError(f"it has {shard} rows of {dtype} in shards, {chunk} in chunks")
    rest = {name: _get(page, name, str) for name in ("config", "weights")}
    rest |= {name: _get(page, name, str, type(None)) for name in ("tokenizer", "source")}
    rows = _get(page, "rows", int, type(None), low=1)
    skip_first = _get(page, "skip_first", bool)
    return Specification(columns, dtype, shard, chunk, rows, skip_first, not_finite, **rest)


def _shard(page: Any, said: Specification) -> Shard:
    digests, sizes = _get(page, "sha256", list), _get(page, "sizes", list)
    rows, one = _get(page, "rows", int, low=1), NUMPY[said.dtype].itemsize
    fine = [isinstance(x, str) and bool(_SHA256.fullmatch(x)) for x in digests]
    if {len(digests), len(sizes)} == {len(said.columns)}:
        least = [rows * column.width * one for column in said.columns]
        fine += [type(size) is int and size > x for size, x in zip(sizes, least, strict=True)]
    else:
        fine = [False]
    if not all(fine) or rows > said.shard_rows:
        raise _WrongError("a shard is not what the specification says")
    return Shard(rows, tuple(digests), tuple(sizes), _position(_get(page, "end", dict)))


def _position(page: dict[str, Any]) -> Position:
    numbers = (_get(page, "batches", int), _get(page, "rows", int))
    return Position(
        *numbers, _get(page, "digest", str), _get(page, "following", str, type(None)), page.get("state")
    )


def _moments(page: Any, width: int) -> Moments:
    lists = [_get(page, name, list) for name in ("mean", "squares")]
    if any(len(x) != width or not all(type(v) in (int, float) for v in x) for x in lists):
        raise _WrongError("moments are not as many numbers as a row has")
    mean, squares = (np.array(x, np.float64) for x in lists)
    return Moments(mean, squares, _get(page, "count", int))
