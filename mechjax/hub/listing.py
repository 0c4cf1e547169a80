"""`mechjax.json`: a folder's list of its files, with their checksums and where they come from.

Other libraries do not look at it. It carries a checksum of itself, so that no byte of the folder can change unnoticed.
Names in it are compared with those of files that are there; none becomes a path.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np

from mechjax.base.atomic import replace_file
from mechjax.base.digests import file_digest
from mechjax.base.provenance import Provenance
from mechjax.base.signed import signed
from mechjax.hub.tensor_file import TensorFile

LISTING = "mechjax.json"
FORMAT = "mechjax files 1"
_AT_ONCE = 16 << 20  # bytes of a tensor


def list_files(folder: Path, provenance: Provenance) -> None:
    """Write the list of a folder's files as they are now. Cost: one SHA-256 and one CRC-32 over all of them."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name == LISTING or path.name.startswith(".") or not path.is_file():
            continue
        files[path.name] = {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        if path.suffix == ".safetensors":
            tensors = TensorFile(path)
            files[path.name]["crc32"] = {name: crc_of(tensors[name]) for name in tensors.entries}
    page = {"format": FORMAT, "files": files, "provenance": provenance.page()}
    replace_file(folder / LISTING, signed(page, "indented"))


def crc_of(tensor: np.ndarray) -> str:
    """CRC-32 of a tensor's bytes, read piece by piece where it is a map of a file."""
    data, found = tensor.reshape(-1).view(np.uint8), 0
    for start in range(0, data.size, _AT_ONCE):
        found = zlib.crc32(np.ascontiguousarray(data[start : start + _AT_ONCE]).data, found)
    return f"{found:08x}"
