"""A safetensors file as read-only views of its memory map: checked whole before anything is allocated.

The `safetensors` library copies every tensor that it returns, accepts a name that stands twice, and fails with
bare numpy errors for some shapes and dtypes. Here a tensor is a view, so reading costs no anonymous memory, and
whatever a hostile header says ends in a `CheckpointError`.

Layout: 8 bytes little-endian header length, the header in JSON (name -> dtype, shape, data_offsets), the data.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mechjax.base.errors import CheckpointError, did_you_mean
from mechjax.hub.json_files import LARGEST_JSON, parse_object

_LENGTH_BYTES = 8
_MOST_AXES = 32
DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: its dtype and shape, and its bytes `start:stop` counted from the file's start."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The tensors of one safetensors file; `file[name]` is a read-only view of the memory map.

    Attributes:
        path: Of the file.
        entries: Dtype, shape and place of every tensor, in the order of their data.
        metadata: What the file says of itself, text under text.
    """

    def __init__(self, path: Path | str):
        """Map the file and check its whole header.

        Raises:
            CheckpointError: Missing, truncated or inconsistent; the message names the tensor.
        """
        self.path = Path(path)
        try:
            self._bytes = np.memmap(self.path, np.uint8, mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise CheckpointError(f"Cannot read `{self.path}`: {error}.") from None
        self.entries, self.metadata = _read_header(self._bytes, self.path)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.entries:
            raise CheckpointError(
                f"`{self.path.name}` holds no tensor `{name}`.{did_you_mean(name, self.entries)}"
            )
        entry = self.entries[name]
        return self._bytes[entry.start : entry.stop].view(entry.dtype).reshape(entry.shape)


def _read_header(data: np.ndarray, path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries, in the order of their data, and metadata of the file whose bytes are `data`; every claim is checked."""
    what = f"`{path}`"
    if data.size < _LENGTH_BYTES:
        raise CheckpointError(
            f"{what} is truncated: {data.size} bytes cannot hold a safetensors header length."
        )
    length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
    begin = _LENGTH_BYTES + length
    if length > LARGEST_JSON or begin > data.size:
        raise CheckpointError(
            f"{what} is truncated or no safetensors file: its header claims {length} bytes, "
            f"{data.size - _LENGTH_BYTES} follow. Download it again."
        )
    header = parse_object(data[_LENGTH_BYTES:begin].tobytes(), f"The header of {what}")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(f"The metadata of {what} are no text under names: {_brief(metadata)}.")
    entries = {name: _read_entry(name, claim, what, begin, data.size) for name, claim in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end, before = begin, None
    for name, entry in entries.items():
        if entry.start < end:
            raise CheckpointError(f"Tensors `{before}` and `{name}` of {what} overlap.")
        if entry.start > end:
            raise CheckpointError(f"{entry.start - end} bytes of {what} before `{name}` belong to no tensor.")
        end, before = entry.stop, name
    if end < data.size:
        raise CheckpointError(
            f"{what} has {data.size - end} bytes after its last tensor that belong to none."
        )
    return entries, metadata


def _read_entry(name: str, claim: Any, what: str, begin: int, size: int) -> Entry:
    """The entry of `name` as the header claims it, after checking it against the `size` bytes of the file."""
    tensor = f"Tensor `{name}` of {what}"
    if not isinstance(claim, dict) or not {"dtype", "shape", "data_offsets"} <= claim.keys():
        raise CheckpointError(f"{tensor} lacks its dtype, shape or data_offsets.")
    shape, offsets = claim["shape"], claim["data_offsets"]
    if not isinstance(claim["dtype"], str) or claim["dtype"] not in DTYPES:
        raise CheckpointError(f"{tensor} has the dtype {claim['dtype']!r}; known are {', '.join(DTYPES)}.")
    if not _is_sizes(shape) or len(shape) > _MOST_AXES:
        raise CheckpointError(f"{tensor} has the shape {_brief(shape)}; a short list of sizes was expected.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{tensor} has the offsets {_brief(offsets)}; [start, stop] was expected.")
    if begin + offsets[1] > size:
        raise CheckpointError(
            f"{what} is truncated: its tensor `{name}` ends at byte {begin + offsets[1]}, the file at {size}. "
            "Download it again."
        )
    dtype = DTYPES[claim["dtype"]]
    # A size of 0 would hide any other size from the product; numpy refuses those with an untyped error.
    if math.prod(size or 1 for size in shape) * dtype.itemsize >= 1 << 62:
        raise CheckpointError(f"{tensor} has the absurd shape {_brief(shape)}.")
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{tensor} has the shape {shape} in {claim['dtype']}, {math.prod(shape) * dtype.itemsize} bytes, "
            f"but its offsets span {offsets[1] - offsets[0]}."
        )
    return Entry(dtype, tuple(shape), begin + offsets[0], begin + offsets[1])


def _is_sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers (JSON's true is no integer)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
