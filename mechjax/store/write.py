"""Write activations to disk, for dictionaries to be trained on.

One run of the model gives every site and layer. Rows are gathered in memory until a shard is full; it is then written
while the next one fills. A shard counts once the manifest says so, which is after its rows are on disk: whatever breaks
writing off, the same call goes on behind the last whole shard, and what comes out is to the bit what it would have been
(on the same devices, by the same JAX).

Cost: a run of the model over the prompts, up to the last layer asked for; memory of two shards and two batches; about
what copying the rows and one SHA-256 and double-precision sums over them take. Going on reads the prompts from their
start, without the model, unless they can say where they were (`mechjax.text.pack`). Of several processes that share
a mesh all must call it, on one file system; the first writes.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from mechjax.base.errors import ArgumentError, WriteError
from mechjax.base.processes import by_the_first
from mechjax.base.progress import bar
from mechjax.hub import Tokenizer
from mechjax.models.structures import Model
from mechjax.store.arrays import Columns, place, write_metadata, write_shard
from mechjax.store.calls import Reader, Reading, reading, said_model
from mechjax.store.capturing import Filled, shards_from
from mechjax.store.identity import model_digests, tokenizer_digest
from mechjax.store.lock import sole_writer
from mechjax.store.manifest import (
    DTYPES,
    NAME,
    Manifest,
    NotFinite,
    Shard,
    Specification,
    check_same,
    made_here,
    read_manifest,
    write_manifest,
)
from mechjax.store.moments import merged, no_moments
from mechjax.store.read import Store
from mechjax.store.rows import NUMPY, Column, columns_of
from mechjax.store.source import start_of

_CHUNK, _SHARDS = 128 << 10, 128 << 20  # bytes of a chunk, and of a shard of every column together


def write(
    folder: str | Path,
    model: Model | Callable[..., Any],
    prompts: Iterable[Any],
    sites: str | Sequence[str],
    *,
    layers: int | Sequence[int] | None = None,
    dtype: str = "float32",
    shard_rows: int | None = None,
    rows: int | None = None,
    skip_first: bool = False,
    not_finite: NotFinite = "abort",
    tokenizer: Tokenizer | None = None,
    source: str | None = None,
) -> Store:
    """Activations of every real token of some prompts, to a folder; goes on where it was broken off.

    Args:
        folder: Where to; made if it is not there. One that holds the beginning of this store is continued.
        model: The model, a subject (`mechjax.interop`), or any function with sites.
        prompts: Batches of prompts from their start: `Prompts`, ids (batch, pos), or what `mechjax.text.pack` gives.
            Of other functions batches of whatever they take: arrays, tuples of arguments or dictionaries of named
            ones, as an encoder-decoder takes both its texts; `Prompts` and an `attention_mask` say what is padding.
            Best of one shape: each further length is compiled for.
        sites: Whose activations. Axes without a name, and `pos`, `patch`, `height` and `width`, become rows; the others
            are laid side by side (heads of `z`, say). Where no axis has a name the last one is the row's.
        layers: Of which layers, every site; None for all.
        dtype: "float32", "bfloat16" or "float16".
        shard_rows: Rows of a shard, what is lost where writing breaks off; None for 128 MiB of all sites together.
        rows: After how many rows to end; None for all.
        skip_first: Whether the first real token of each text is left out: it often is far larger than all others.
        not_finite: What to do with a token of which a row is not finite: "abort", or "skip" it (in all) and count.
        tokenizer: What made the tokens, whose checksum is then kept.
        source: What the prompts are, in words that are then kept.

    Returns:
        The store, open for reading.

    Raises:
        ArgumentError: Another store than the one in the folder (the message says in what), other prompts, a choice that
            there is not, or activations that are not finite.
        SiteError: A site or layer that is not there, or without a vector at each position; sites of unlike rows.
        NeedsDecoderError: Something that cannot be called.
        CheckpointError: A shard that was written is missing, or the manifest is not whole.
        WriteError: The folder cannot be written, or somebody else is writing to it. What was whole stays so, and the
            message says from where the same call goes on.
    """
    folder, read = Path(folder), reading(model, prompts)
    columns = columns_of(read.model, sites, layers, read.first)
    said = _specification(
        read, columns, dtype, shard_rows, rows, skip_first, not_finite, tokenizer, source
    )  # fmt: skip
    with ExitStack() as held:
        by_the_first(lambda: held.enter_context(sole_writer(folder)))
        manifest = by_the_first(lambda: _begun(folder, said, read)) or read_manifest(folder)
        if not manifest.complete:
            manifest = _written(folder, read.model, read.prompts, manifest)
    return Store(folder, manifest)


def _specification(
    read: Reading, columns: tuple[Column, ...], dtype: str, shard_rows: int | None, rows: int | None,
    skip_first: bool, not_finite: NotFinite, tokenizer: Tokenizer | None, source: str | None,
) -> Specification:  # fmt: skip
    """What was asked for.

    Raises:
        ArgumentError: Something that there is not.
    """
    if dtype not in DTYPES or not_finite not in ("abort", "skip"):
        raise ArgumentError(
            f"dtype={dtype!r}, not_finite={not_finite!r}: dtype is one of {', '.join(DTYPES)}, and not_finite is "
            "'abort' or 'skip'."
        )
    if (shard_rows is not None and shard_rows < 1) or (rows is not None and rows < 1):
        raise ArgumentError(f"shard_rows={shard_rows}, rows={rows}: both are 1 or more, or None.")
    size = NUMPY[dtype].itemsize
    chunk = _power_of_two(_CHUNK // (size * max(column.width for column in columns)))
    if shard_rows is None:
        fits = _SHARDS // (size * sum(column.width for column in columns))
        shard_rows = max(fits // chunk, 1) * chunk
    while shard_rows % chunk:
        chunk //= 2
    return Specification(
        columns, dtype, shard_rows, chunk, rows, skip_first, not_finite, **model_digests(read),
        tokenizer=tokenizer_digest(tokenizer), source=source,
    )  # fmt: skip


def _power_of_two(most: int) -> int:
    """The largest power of two up to `most`, from 1 to 1024."""
    return min(1 << max(most.bit_length() - 1, 0), 1024)


def _begun(folder: Path, said: Specification, read: Reading) -> Manifest:
    """The manifest of the folder, a new one where it is empty."""
    model = said_model(read.model)
    for stale in (*folder.glob(".saving-*"), *folder.glob("array-*/.saving-*")):  # of who was killed
        stale.unlink(missing_ok=True)
    if (folder / NAME).exists():
        manifest = read_manifest(folder)
        check_same(folder, manifest.specification, said)
        Columns(folder, manifest).check_files()
        return (
            manifest if manifest.complete else replace(manifest, made=made_here(said, model, manifest.made))
        )
    if others := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
        raise ArgumentError(
            f"`{folder}` holds no store, but other files ({', '.join(sorted(others)[:3])}). Choose a folder of its own."
        )
    nothing = tuple(no_moments(column.width) for column in said.columns)
    manifest = Manifest(
        said, start_of(read.prompts), (), nothing, 0, complete=False, made=made_here(said, model)
    )
    write_manifest(folder, manifest)
    return manifest


def _written(folder: Path, model: Reader, prompts: Iterable[Any], manifest: Manifest) -> Manifest:
    """The manifest once everything is written."""
    said, stored = manifest.specification, manifest.rows
    left = None if said.rows is None else said.rows - stored
    what = ", ".join(dict.fromkeys(column.site for column in said.columns))
    waiting: Callable[[], Manifest] | None = None
    with ThreadPoolExecutor(1) as pool, bar(f"Storing {what}", said.rows) as progress:
        progress.advance(stored)
        progress.begin(f"Storing {what}")
        for shard in shards_from(model, prompts, said, manifest.end, left):
            manifest = manifest if waiting is None else by_the_first(waiting) or manifest
            waiting = partial(read_manifest, folder)
            if jax.process_index() == 0:
                waiting = pool.submit(_with_shard, folder, manifest, shard).result
            progress.advance(len(shard.columns[0]))
        return manifest if waiting is None else by_the_first(waiting) or read_manifest(folder)


def _with_shard(folder: Path, manifest: Manifest, shard: Filled) -> Manifest:
    """The manifest with a shard more, which it says once the rows are on disk.

    Raises:
        WriteError: They cannot be written.
    """
    number, said, rows = len(manifest.shards), manifest.specification, len(shard.columns[0])
    new = replace(manifest, skipped=manifest.skipped + shard.skipped, complete=shard.last)
    try:
        if rows:
            written = [write_shard(folder, said, i, number, x) for i, x in enumerate(shard.columns)]
            digests, sizes, moments = zip(*written, strict=True)
            moments = tuple(map(merged, manifest.moments, moments))
            added = Shard(rows, digests, sizes, shard.end)
            new = replace(new, shards=(*manifest.shards, added), moments=moments)
        if shard.last:
            write_metadata(folder, said, new.rows)
        write_manifest(folder, new)
    except OSError as error:
        for column in range(len(said.columns)):  # it does not count, and room may be what is missing
            with suppress(OSError):
                place(folder, column, number).unlink()
        raise WriteError(
            f"shard {number} was not stored: {str(error).rstrip('.')}. The {number} shards before it "
            f"({manifest.rows} rows) are whole. Make room, or the folder writable, and call `write` again with the "
            f"same arguments: it goes on behind batch {manifest.end.batches} of the prompts."
        ) from error
    return new
