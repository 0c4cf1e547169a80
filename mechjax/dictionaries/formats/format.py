"""What a format is: how it is recognised, what is fetched of it, and how it is read."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mechjax.dictionaries.formats.tensors import Settings
from mechjax.hub.folder import inside
from mechjax.hub.json_files import read_object


@dataclass(frozen=True)
class Place:
    """Files to read a dictionary from.

    Attributes:
        folder: Where they lie.
        file: The one that was asked for by name; None for the folder.
        layer: The layer that was asked for; None for all, where there are several.
        dtype: In which numbers are read and folded: float32 or float64.
        scale: What inputs are multiplied by and outputs divided by, where the format does not say; None for nothing.
    """

    folder: Path
    file: str | None = None
    layer: int | None = None
    dtype: np.dtype = field(default_factory=lambda: np.dtype(np.float32))
    scale: float | int | None = None

    def settings(self, name: str) -> Settings:
        """The config in the file `name`."""
        return Settings(f"`{self.folder / name}`", read_object(inside(self.folder, name)))

    def numbered(self, pattern: str) -> dict[int, str]:
        """Files of the folder whose names match `pattern`, by the number in them."""
        found = {}
        for path in self.folder.iterdir():
            if match := re.fullmatch(pattern, path.name, re.ASCII):
                found[int(match[1])] = path.name
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Format:
    """A layout of files.

    Attributes:
        name: What `load(format=...)` calls it.
        files: Patterns (regular expressions) of files that are all there in this format.
        writer: Who writes or publishes it.
        read: Makes the dictionary.
        lacks: Patterns of files that are never there in it.
    """

    name: str
    files: tuple[str, ...]
    writer: str
    read: Callable[[Place], Any]
    lacks: tuple[str, ...] = ()

    def fits(self, names: set[str], file: str | None) -> bool:
        """Whether a folder with files of these names is of this format, and `file` one of its files."""
        there = lambda pattern: any(re.fullmatch(pattern, name, re.ASCII) for name in names)
        mine = file is None or any(re.fullmatch(pattern, file, re.ASCII) for pattern in self.files)
        return mine and all(map(there, self.files)) and not any(map(there, self.lacks))
