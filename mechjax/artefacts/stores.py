"""Stores of activations that `mj.store.write` wrote."""

from collections.abc import Iterator
from pathlib import Path

from mechjax.artefacts.found import File, Found, size_of, told
from mechjax.base.errors import CheckpointError
from mechjax.base.progress import bar
from mechjax.store.arrays import Columns, metadata_whole, place
from mechjax.store.manifest import NAME, Manifest, read_manifest


def fits(path: Path) -> bool:
    """Whether a store lies there, or the arrays of one that has lost its manifest."""
    if (path / "array-000").is_dir():
        return True
    return (path / NAME).is_file() and b"mechjax" in (path / NAME).read_bytes()


def check(path: Path) -> Found:
    """Read every row, and compare it with the CRC-32C of its chunk and the SHA-256 of its shard."""
    if not (path / NAME).is_file():
        return Found((File(NAME, 0, "is missing"),))
    size = size_of(path / NAME)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return Found((File(NAME, size, told(error, path)),))
    notes = () if manifest.complete else (f"not complete: writing broke off after {manifest.rows} rows",)
    notes += () if manifest.made else ("says nothing of where it comes from: an older mechjax wrote it",)
    files = (File(NAME, size), *_metadata(path, manifest), *_shards(path, manifest))
    return Found(files, manifest.made[-1:], notes)


def _metadata(path: Path, manifest: Manifest) -> Iterator[File]:
    for column, _ in enumerate(manifest.specification.columns if manifest.complete else ()):
        name = f"array-{column:03d}/zarr.json"
        whole = metadata_whole(path, manifest, column)
        problem = "" if whole else "was changed" if (path / name).is_file() else "is missing"
        yield File(name, size_of(path / name), problem)


def _shards(path: Path, manifest: Manifest) -> Iterator[File]:
    columns, names = Columns(path, manifest), manifest.specification.columns
    with bar("Verifying shards", len(names) * len(manifest.shards), compiles=False) as progress:
        for column, what in enumerate(names):
            for number, shard in enumerate(manifest.shards):
                file = place(path, column, number)
                name, size, problem = file.relative_to(path).as_posix(), size_of(file), ""
                if not file.is_file():
                    problem = "is missing"
                elif size != shard.sizes[column]:
                    problem = f"has {size} bytes where {shard.sizes[column]} were written"
                else:
                    problem = _problem(columns, column, number)
                yield File(name, size, problem, (str(what).replace("`", ""),) if problem else ())
                progress.advance()


def _problem(columns: Columns, column: int, shard: int) -> str:
    try:
        columns.shard(column, shard)
    except CheckpointError as error:
        return told(error, columns.folder)
    return ""
