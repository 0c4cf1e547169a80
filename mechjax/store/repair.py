"""Write again what of a store is missing or damaged, and that alone."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.models.structures import Model
from mechjax.store.arrays import Columns, digest_of, write_metadata, write_shard
from mechjax.store.calls import Reader, reading, said_model
from mechjax.store.capturing import Rows, shards_from
from mechjax.store.identity import model_digests
from mechjax.store.lock import sole_writer
from mechjax.store.manifest import Manifest, Shard, check_same, made_here, read_manifest, write_manifest
from mechjax.store.moments import merged, moments_of, no_moments
from mechjax.store.read import Store
from mechjax.store.verify import verify


def repair(
    folder: str | Path, model: Model | Callable[..., Any], prompts: Iterable[Any], *, same_bits: bool = True
) -> Store:
    """Make the shards that are missing or damaged again, from the model and the prompts.

    Args:
        folder: What `mechjax.store.write` wrote; one that is not complete stays so.
        model: The model, subject or function that it is of.
        prompts: The prompts that it is of, from their start.
        same_bits: Whether rows must come out as they were, to the bit. Another device or another JAX rounds otherwise;
            False takes such rows, and the moments are gathered again from all of them.

    Returns:
        The store, all of whose shards are whole.

    Raises:
        ArgumentError: Another model, or other prompts.
        CheckpointError: No store, a manifest that is not whole, or rows that came out otherwise.
        WriteError: The folder cannot be written, or somebody else is writing to it.
    """
    folder = Path(folder)
    read_manifest(folder)
    with sole_writer(folder):
        manifest = read_manifest(folder)
        said = manifest.specification
        read = reading(model, prompts)
        check_same(folder, said, replace(said, **model_digests(read)))
        found = verify(folder)
        if manifest.complete:
            write_metadata(folder, said, manifest.rows)
        shards = list(manifest.shards)
        for number in found.damaged:
            rows = _again(read.model, read.prompts, manifest, number)
            shards[number] = _replaced(
                folder, manifest, number, rows, found.whole[number].tolist(), same_bits
            )
        if shards != list(manifest.shards):
            made = made_here(said, said_model(read.model), manifest.made)
            manifest = _with_moments(folder, replace(manifest, shards=tuple(shards), made=made))
            write_manifest(folder, manifest)
    return Store(folder, manifest)


def _again(model: Reader, prompts: Iterable[Any], manifest: Manifest, number: int) -> Rows:
    """The rows of a shard, made again as they were made.

    Raises:
        ArgumentError: Other prompts.
    """
    said, old, start = manifest.specification, manifest.shards[number], manifest.start_of(number)
    left = None if said.rows is None else said.rows - number * said.shard_rows
    made = next(shards_from(model, prompts, said, start, left))
    if len(made.columns[0]) != old.rows or replace(made.end, state=None) != replace(old.end, state=None):
        raise ArgumentError(
            f"these prompts are not those of shard {number}: they give {len(made.columns[0])} rows where {old.rows} "
            f"were, or differ in batches {start.batches + 1} to {old.end.batches + 1}. Give those that it was written "
            "from, from their start."
        )
    return made.columns


def _replaced(
    folder: Path, manifest: Manifest, number: int, rows: Rows, whole: list[bool], same_bits: bool
) -> Shard:
    """Write the columns of a shard that are not whole.

    Raises:
        CheckpointError: They came out otherwise, and that is not taken.
        WriteError: They cannot be written.
    """
    old = manifest.shards[number]
    digests, sizes = list(old.sha256), list(old.sizes)
    for i, ok in enumerate(whole):
        if ok:
            continue
        digests[i] = digest_of(rows[i])
        if same_bits and digests[i] != old.sha256[i]:
            raise CheckpointError(
                f"shard {number} of {manifest.specification.columns[i]} came out with other bits than it was written "
                "with, and was left as it is: another device, or another JAX, rounds otherwise. Repair it where it was "
                "written, or take the rows as they are now: same_bits=False."
            )
        sizes[i] = write_shard(folder, manifest.specification, i, number, rows[i])[1]
    return replace(old, sha256=tuple(digests), sizes=tuple(sizes))


def _with_moments(folder: Path, manifest: Manifest) -> Manifest:
    """The manifest with the moments of the rows as they are now."""
    columns, moments = Columns(folder, manifest), []
    for i, column in enumerate(manifest.specification.columns):
        parts = (moments_of(columns.shard(i, number)) for number in range(len(manifest.shards)))
        moments.append(reduce(merged, parts, no_moments(column.width)))
    return replace(manifest, moments=tuple(moments))
