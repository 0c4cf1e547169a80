"""Documents from JSONL, text files or any iterable of strings, one at a time, from any place on.

A place in them is a cursor, a dictionary of integers: which document comes next, and for files where it lies. Files are
read as UTF-8, line by line; nothing holds more than one document.
"""

import abc
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from mechjax.base.errors import ArgumentError, CheckpointError, TokenError, did_you_mean

Cursor = dict[str, int]
_JSONL = (".jsonl", ".ndjson")
_START: Cursor = {"document": 0, "file": 0, "byte": 0, "line": 0}


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: The text.
        number: Its place in the order of the source, from 0.
        place: Where it comes from, in words, for messages.
    """

    text: str
    number: int
    place: str


class Documents(abc.ABC):
    """Texts that can be read from any place on; iterating gives the strings from the start. Made by `documents`."""

    def __init__(self, skip_empty: bool) -> None:
        self._skip_empty = skip_empty

    def __iter__(self) -> Iterator[str]:
        return (document.text for document, _ in self.read())

    def read(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """The documents from `cursor` on (None: from the start), each with the cursor behind it.

        Raises:
            TokenError: A text that is empty, no UTF-8, no string, or not where the JSON should have it.
            CheckpointError: A file that cannot be read.
        """
        for document, after in self._read(dict(cursor or _START)):
            if document.text.strip():
                yield document, after
            elif not self._skip_empty:
                raise TokenError(
                    f"{document.place} is empty. Leave it out of the data, or pass empty='skip' to documents."
                )

    @abc.abstractmethod
    def fingerprint(self) -> Any:
        """What tells this source from another, as JSON: names and sizes of files, or how many texts there are."""

    @abc.abstractmethod
    def _read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        """Every document, empty ones too, each with the cursor behind it."""


def documents(
    source: str | Path | Iterable[str] | Iterable[Path],
    *,
    field: str = "text",
    per: Literal["file", "line"] = "file",
    empty: Literal["raise", "skip"] = "raise",
) -> Documents:
    """The documents of files, or of any iterable of strings.

    Args:
        source: A path, a folder (all `.jsonl`, `.ndjson` and `.txt` files directly in it, by name), an iterable of
            `Path`s, or an iterable of texts. A string alone is a path; strings in an iterable are texts.
        field: Where each line of a JSONL file has its text.
        per: Whether any other file is one document, or each of its lines that is not blank.
        empty: What to do with a text of nothing but white space.

    Returns:
        The documents. They can be iterated as often as the source can.

    Raises:
        CheckpointError: There is no such file.
        ArgumentError: The source is neither files nor texts, or it is unclear which.
    """
    if per not in ("file", "line") or empty not in ("raise", "skip"):
        raise ArgumentError(
            f"per={per!r}, empty={empty!r}: per is 'file' or 'line', empty is 'raise' or 'skip'."
        )
    if isinstance(source, (str, Path)):
        return _InFiles(_files(Path(source)), field, per == "line", empty == "skip")
    if not isinstance(source, Iterable):
        raise ArgumentError(
            f"documents takes a path, paths or an iterable of strings, got {type(source).__name__}."
        )
    if isinstance(source, Sequence) and source and all(isinstance(one, Path) for one in source):
        paths = [path for one in source for path in _files(Path(str(one)))]
        return _InFiles(paths, field, per == "line", empty == "skip")
    if isinstance(source, Sequence) and source and _names_file(source[0]):
        raise ArgumentError(
            f"documents was given a list of strings, which are texts, but the first, {source[0]!r}, is also a file. "
            "For files give paths: [Path(name) for name in names]."
        )
    return _InMemory(source, empty == "skip")


def _names_file(text: Any) -> bool:
    return isinstance(text, str) and 0 < len(text) < 256 and text.isprintable() and Path(text).is_file()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix in (*_JSONL, ".txt") and p.is_file())
        if not found:
            raise CheckpointError(f"the folder `{path}` has no .jsonl, .ndjson or .txt file. Name the files.")
        return found
    if not path.is_file():
        raise CheckpointError(
            f"there is no file `{path}`. Give the path of a file or folder; a text itself goes in a list: [text]."
        )
    return [path]


class _InMemory(Documents):
    """Strings of an iterable; one that can be read only once, once."""

    def __init__(self, texts: Iterable[Any], skip_empty: bool) -> None:
        super().__init__(skip_empty)
        self._texts = texts
        self._spent = False

    def fingerprint(self) -> Any:
        return len(self._texts) if isinstance(self._texts, Sequence) else None

    def _read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        texts = iter(self._texts)
        if texts is self._texts:
            if self._spent:
                raise ArgumentError(
                    "these documents come from an iterator, which can be read only once. For another epoch, or to go "
                    "back, give a list, files, or an object whose __iter__ starts anew."
                )
            self._spent = True
        start = cursor["document"]
        for number, text in enumerate(islice(texts, start, None), start):
            place = f"document {number}"
            if not isinstance(text, str):
                raise TokenError(f"{place} is a {type(text).__name__}; every document must be a string.")
            yield Document(text, number, place), _START | {"document": number + 1}


class _InFiles(Documents):
    """Texts of files, one after the other."""

    def __init__(self, paths: list[Path], field: str, by_line: bool, skip_empty: bool) -> None:
        super().__init__(skip_empty)
        self._paths, self._field, self._by_line = paths, field, by_line

    def fingerprint(self) -> Any:
        return [[path.name, path.stat().st_size] for path in self._paths]

    def _read(self, cursor: Cursor) -> Iterator[tuple[Document, Cursor]]:
        number = cursor["document"]
        for file, path in enumerate(self._paths):
            if file < cursor["file"]:
                continue
            here = cursor if file == cursor["file"] else _START
            for text, line, byte in self._texts(path, here):
                place = f"`{path}`" if line == 0 else f"line {line} of `{path}`"
                yield Document(text, number, place), {
                    "document": number + 1, "file": file, "byte": byte, "line": line,
                }  # fmt: skip
                number += 1

    def _texts(self, path: Path, here: Cursor) -> Iterator[tuple[str, int, int]]:
        """Text, line (0 for a whole file) and the byte behind it."""
        is_jsonl = path.suffix in _JSONL
        try:
            with path.open("rb") as lines:
                lines.seek(here["byte"])
                if not is_jsonl and not self._by_line:
                    if data := lines.read():
                        yield _decoded(data, path, None), 0, here["byte"] + len(data)
                    elif here["byte"] == 0:
                        yield "", 0, 0
                    return
                byte = here["byte"]
                for line, data in enumerate(lines, here["line"] + 1):
                    byte += len(data)
                    text = _decoded(data, path, line).rstrip("\r\n")
                    if text.strip():
                        yield (self._of_json(text, path, line) if is_jsonl else text), line, byte
        except OSError as error:
            raise CheckpointError(f"cannot read `{path}`: {error.strerror or error}.") from None

    def _of_json(self, text: str, path: Path, line: int) -> str:
        where = f"line {line} of `{path}`"
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise TokenError(
                f"{where} is no JSON: {error}. A .jsonl file has one JSON object per line."
            ) from None
        if not isinstance(value, dict):
            raise TokenError(
                f"{where} is a JSON {type(value).__name__}; it must be an object with a text in "
                f"`{self._field}`."
            )
        if self._field not in value:
            have = ", ".join(f"`{key}`" for key in value) or "none"
            raise TokenError(
                f"{where} has no field `{self._field}`; it has {have}.{did_you_mean(self._field, value)} "
                "Say which holds the text: documents(..., field=)."
            )
        if not isinstance(value[self._field], str):
            raise TokenError(
                f"`{self._field}` in {where} is {json.dumps(value[self._field])[:40]}; it must be a string."
            )
        return value[self._field]


def _decoded(data: bytes, path: Path, line: int | None) -> str:
    try:
        return data.decode("utf-8-sig" if line in (None, 1) else "utf-8")
    except UnicodeDecodeError as error:
        line = line or data.count(b"\n", 0, error.start) + 1
        raise TokenError(
            f"line {line} of `{path}` is no UTF-8: byte {data[error.start]:#04x}, {error.reason}. Convert the file to "
            "UTF-8."
        ) from None
