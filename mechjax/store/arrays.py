"""Rows on disk: for each column one zarr array, in shards, through tensorstore.

`array-000/c/12/0` is the twelfth shard of the first column: chunks of some rows, each with its CRC-32C, and their index
with its own. `array-000/zarr.json` is for other readers of zarr version 3; here it follows from the manifest and is not
read. Shards appear whole or not at all (written under another name, synced, renamed).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float, Int

from mechjax.base.atomic import replace_file
from mechjax.base.errors import CheckpointError, WriteError
from mechjax.store.manifest import Manifest, Specification
from mechjax.store.moments import Moments, moments_of

_CACHE = 32 << 20  # bytes of indices, and of chunks
_FAILURES = (ValueError, OSError, RuntimeError)  # what tensorstore raises for what lies on disk
_SUMMED = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def place(folder: Path, column: int, shard: int) -> Path:
    """Where a shard of a column lies."""
    return folder / f"array-{column:03d}" / "c" / str(shard) / "0"


def metadata(said: Specification, column: int, rows: int) -> dict[str, Any]:
    """What zarr calls the metadata of a column of so many rows."""
    what = said.columns[column]
    chunks = {"chunk_shape": [said.chunk_rows, what.width], "codecs": _SUMMED, "index_codecs": _SUMMED}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, what.width],
        "data_type": said.dtype,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": [said.shard_rows, what.width]},
        },
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN",  # no row that is stored, so that what is missing looks like none
        "codecs": [{"name": "sharding_indexed", "configuration": {**chunks, "index_location": "end"}}],
        "dimension_names": ["row", "width"],
        "attributes": {"site": what.site, "layer": what.layer},
    }


def metadata_text(said: Specification, column: int, rows: int) -> bytes:
    """The bytes of `zarr.json`."""
    return json.dumps(metadata(said, column, rows), indent=1).encode()


def write_metadata(folder: Path, said: Specification, rows: int) -> None:
    """Write the metadata of every column."""
    for column in range(len(said.columns)):
        path = folder / f"array-{column:03d}" / "zarr.json"
        path.parent.mkdir(exist_ok=True)
        replace_file(path, metadata_text(said, column, rows))


def metadata_whole(folder: Path, manifest: Manifest, column: int) -> bool:
    """Whether the metadata of a column are as they were written."""
    path = folder / f"array-{column:03d}" / "zarr.json"
    try:
        return path.read_bytes() == metadata_text(manifest.specification, column, manifest.rows)
    except OSError:
        return False


def opened(folder: Path, said: Specification, column: int, rows: int, context: Any = None) -> ts.TensorStore:
    """A column of so many rows. What is missing on disk is an error, not a value."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.absolute() / f'array-{column:03d}'}/"},
        "metadata": metadata(said, column, rows),
        "fill_missing_data_reads": False,
    }
    return ts.open(ts.Spec(spec), open=True, assume_metadata=True, context=context).result()


def write_shard(
    folder: Path, said: Specification, column: int, shard: int, rows: Float[np.ndarray, "row width"]
) -> tuple[str, int, Moments]:
    """Write rows as a shard, in place of what may lie there.

    Returns:
        The checksum of the rows, the size of the file, and the moments of the rows.

    Raises:
        WriteError: They cannot be written. Nothing of them is left.
    """
    path, start = place(folder, column, shard), shard * said.shard_rows
    try:
        path.unlink(missing_ok=True)  # else what is not whole would be read before it is written over
        array = opened(folder, said, column, start + len(rows))
        written = array[start : start + len(rows)].write(rows)
        digest, moments = digest_of(rows), moments_of(rows)  # while the disk is busy
        written.result()
        return digest, path.stat().st_size, moments
    except _FAILURES as error:
        raise WriteError(f"cannot write `{path}`: {_reason(error)}.") from error


def digest_of(rows: Float[np.ndarray, "row width"]) -> str:
    """The checksum of rows."""
    return hashlib.sha256(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data).hexdigest()


class Columns:
    """The columns of a store, open for reading."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        context = ts.Context({"cache_pool": {"total_bytes_limit": _CACHE}})
        self.folder, self.manifest = folder, manifest
        said = manifest.specification
        self._arrays = [opened(folder, said, i, manifest.rows, context) for i, _ in enumerate(said.columns)]

    def asked(self, column: int, rows: Int[np.ndarray, "row"] | slice) -> Any:
        """Rows of a column, to be waited for by `given`: reading goes on in the background."""
        with ts.Batch() as batch:
            return self._arrays[column][rows].read(batch=batch)

    def given(
        self, asked: Any, column: int, rows: Int[np.ndarray, "row"] | slice
    ) -> Float[np.ndarray, "row width"]:
        """Rows that were asked for.

        Raises:
            CheckpointError: A shard is missing or damaged; the message says which.
        """
        try:
            return asked.result()
        except _FAILURES as error:
            raise self._blamed(column, rows, error) from error

    def read(self, column: int, rows: Int[np.ndarray, "row"] | slice) -> Float[np.ndarray, "row width"]:
        """Rows of a column.

        Raises:
            CheckpointError: A shard is missing or damaged; the message says which.
        """
        return self.given(self.asked(column, rows), column, rows)

    def shard(self, column: int, shard: int) -> Float[np.ndarray, "row width"]:
        """All rows of a shard.

        Raises:
            CheckpointError: It is missing or damaged; the message says how.
        """
        start, where = shard * self.manifest.specification.shard_rows, place(self.folder, column, shard)
        try:
            rows = self._arrays[column][start : start + self.manifest.shards[shard].rows].read().result()
        except _FAILURES as error:
            what = "is damaged" if where.exists() else "is missing"
            raise self._wrong(column, shard, what, _reason(error) if where.exists() else None) from error
        if digest_of(rows) != self.manifest.shards[shard].sha256[column]:
            raise self._wrong(column, shard, "holds other rows than were written", None)
        return rows

    def check_files(self) -> None:
        """Whether every file is there and has its size.

        Raises:
            CheckpointError: One is not; the message says which.
        """
        for number, shard in enumerate(self.manifest.shards):
            for column, size in enumerate(shard.sizes):
                path = place(self.folder, column, number)
                if not path.is_file():
                    raise self._wrong(column, number, "is missing", None)
                if path.stat().st_size != size:
                    raise self._wrong(
                        column, number, "is damaged", f"{path.stat().st_size} bytes where {size} were written"
                    )

    def _blamed(self, column: int, rows: Any, error: Exception) -> CheckpointError:
        """The error for the shard because of which rows could not be read."""
        every = np.arange(self.manifest.rows)[rows] if isinstance(rows, slice) else rows
        for number in np.unique(every // self.manifest.specification.shard_rows):
            try:
                self.shard(column, int(number))
            except CheckpointError as found:
                return found
        return CheckpointError(f"`{self.folder}` cannot be read: {_reason(error)}.")

    def _wrong(self, column: int, shard: int, what: str, why: str | None) -> CheckpointError:
        name = self.manifest.specification.columns[column]
        return CheckpointError(
            f"shard {shard} of {name} in `{self.folder}` {what}{f': {why}' if why else ''}. "
            "`mechjax.store.repair(folder, model, prompts)` writes again what is not whole, and that alone; "
            "`mechjax.store.verify(folder)` lists it."
        )


def _reason(error: Exception) -> str:
    """What tensorstore says, without the places in its source."""
    return str(error).partition(" [source locations")[0].strip().rstrip(".")
