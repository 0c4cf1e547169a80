"""Read activations from disk: rows by number, or shuffled batches that dictionaries are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from mechjax.base.catalogue import spelled_out
from mechjax.base.errors import ArgumentError, CheckpointError, SiteError, did_you_mean
from mechjax.store.arrays import Columns
from mechjax.store.batches import Batches, Reading
from mechjax.store.manifest import Manifest, read_manifest
from mechjax.store.moments import Moments
from mechjax.store.order import Order
from mechjax.store.rows import NUMPY, Column

Layers = int | Sequence[int] | None


@dataclass(frozen=True)
class Store:
    """Activations on disk; made by `read` and `write`.

    A table with a row for each token and a column for each site and layer. `len(store)` is how many rows there are.

    Attributes:
        folder: Where it is.
        manifest: What is in it.
    """

    folder: Path
    manifest: Manifest

    def __len__(self) -> int:
        return self.manifest.rows

    def __repr__(self) -> str:
        said = self.manifest.specification
        lines = [
            f"Store of {len(self)} rows in {len(self.manifest.shards)} shards, {said.dtype}, in {self.folder}",
            *(f"  {column}: {column.width} wide" for column in said.columns[:12]),
        ]
        lines += [f"  and {len(said.columns) - 12} more"] if len(said.columns) > 12 else []
        lines += [] if self.manifest.complete else ["  not complete: writing was broken off"]
        lines += [f"  {n} rows were not finite and left out"] if (n := self.manifest.skipped) else []
        return "\n".join(lines)

    @property
    def digest(self) -> str:
        """A checksum of all rows, and of what they are: what a result says of a store that it was made from."""
        return self.manifest.digest

    @property
    def columns(self) -> tuple[Column, ...]:
        """Sites at layers, and how wide their rows are."""
        return self.manifest.specification.columns

    def rows(
        self,
        which: slice | Int[np.ndarray, "row"],
        site: str | None = None,
        *,
        layer: Layers = None,
        dtype: str = "float32",
    ) -> Float[np.ndarray, "row *layer width"]:
        """Rows by their numbers, in the order in which they were written.

        Args:
            which: Which rows.
            site: Of which site; None where there is but one.
            layer: Of which layer, or of several side by side; None where there is but one.
            dtype: What they are given as.

        Raises:
            SiteError: A site or layer that is not in the store.
            ArgumentError: A row that there is not.
            CheckpointError: A shard is missing or damaged; the message says which.
        """
        found, stacked = self._found(site, layer)
        at = np.arange(len(self))[which] if isinstance(which, slice) else np.asarray(which)
        at = np.where(at < 0, at + len(self), at)
        if ((at < 0) | (at >= len(self))).any():
            raise ArgumentError(
                f"rows {which} of a store of {len(self)} rows: they are 0 to {len(self) - 1}."
            )
        columns = Columns(self.folder, self.manifest)
        several = [columns.read(column, at).astype(_dtype(dtype)) for column in found]
        return np.stack(several, 1) if stacked else several[0]

    def moments(self, site: str | None = None, *, layer: int | None = None) -> Moments:
        """Mean and spread of a column over all rows, in double precision.

        Args:
            site: Of which site; None where there is but one.
            layer: Of which layer; None where there is but one.

        Raises:
            SiteError: A site or layer that is not in the store.
        """
        return self.manifest.moments[self._found(site, layer)[0][0]]

    def batches(
        self,
        site: str | None = None,
        *,
        batch: int,
        key: Key[Array, ""] | Array | None,
        layer: Layers = None,
        target: tuple[str, int | Sequence[int]] | None = None,
        epochs: int | None = 1,
        buffer: int | None = None,
        dtype: str = "float32",
    ) -> Batches:
        """Batches of rows in random order, each row once in an epoch, as `mechjax.dictlearn.train` takes them.

        Memory: two buffers, and 16 bytes for each chunk of the store (about 128 KiB).

        Args:
            site: Of which site; None where there is but one.
            batch: Rows of a batch.
            key: Shuffles; None for the order in which rows were written.
            layer: Of which layer; several are given side by side (batch, layer, width), as a crosscoder takes them.
            target: A site and its layer or layers, of which the same tokens' rows are given as the second of a pair, as
                a transcoder takes it.
            epochs: How often to go through the rows; None without end. Batches go on over the end of an epoch, and rows
                that fill no batch at the very end are not given.
            buffer: Rows that are shuffled together, and held; None for 64 batches.
            dtype: What they are given as.

        Returns:
            An iterator over arrays (batch, width), or pairs of them, whose place can be saved (`state` and `resume`, or
            `step` and `at`).

        Raises:
            SiteError: A site or layer that is not in the store.
            ArgumentError: Fewer rows than one batch, or a size that there is not.
        """
        held = 64 * batch if buffer is None else buffer
        if batch < 1 or held < batch or (epochs is not None and epochs < 1):
            raise ArgumentError(
                f"batch={batch}, buffer={held}, epochs={epochs}: a batch has 1 row or more, the buffer holds at least "
                "one batch and shuffles well from some dozens on, and there is 1 epoch or more, or None without end."
            )
        if len(self) < batch:
            raise ArgumentError(
                f"batch={batch}, and the store has {len(self)} rows: ask for smaller batches."
            )
        chunk = self.manifest.specification.chunk_rows
        order = Order(len(self), chunk, max(held // chunk, 1), None if key is None else _words(key))
        sides = [self._found(site, layer)] + ([] if target is None else [self._found(*target)])
        reading = Reading(order, batch, epochs, tuple(sides), _dtype(dtype).name)
        return Batches(Columns(self.folder, self.manifest), reading)

    def _found(self, site: str | None, layer: Layers) -> tuple[tuple[int, ...], bool]:
        """Which columns are asked for, and whether they are to be side by side.

        Raises:
            SiteError: Some that there are not, or it is unclear which.
        """
        names = list(dict.fromkeys(column.site for column in self.columns))
        if site is None and len(names) > 1:
            raise SiteError(f"the store holds {', '.join(names)}: say which site.")
        site = names[0] if site is None else site
        known, said = (site, None) if site in names else spelled_out(site)
        layer = layer if said is None else said
        there = {column.layer: i for i, column in enumerate(self.columns) if column.site == known}
        if not there:
            raise SiteError(
                f"no `{site}` in the store; it holds {', '.join(names)}.{did_you_mean(known, names)}"
            )
        if layer is None and len(there) > 1:
            raise SiteError(f"the store holds `{known}` of layers {list(there)}: say which layer.")
        stacked = isinstance(layer, Sequence)
        asked = next(iter(there)) if layer is None else layer
        wanted = tuple(asked) if isinstance(asked, Sequence) else (asked,)
        if missing := [one for one in wanted if one not in there] or not wanted:
            raise SiteError(f"no layer {missing} of `{known}` in the store; it holds {list(there)}.")
        return tuple(there[one] for one in wanted), stacked


def read(folder: str | Path, *, partial: bool = False) -> Store:
    """Open a store.

    Only what the manifest speaks of is ever read: rows that were being written when writing broke off are not. Every
    file must be there and have its size; that its bits are those that were written shows when they are read (each chunk
    has a CRC-32C), or all at once in `verify`.

    Args:
        folder: What `write` wrote.
        partial: Whether one that is not complete will do.

    Raises:
        CheckpointError: No store, one of another version, a manifest that is not whole, a shard that is missing or has
            another size, or a store that is not complete.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest.complete and not partial:
        raise CheckpointError(
            f"`{folder}` is not complete: writing broke off after {manifest.rows} rows. Call `mechjax.store.write` "
            "with the same arguments to go on, or pass partial=True to read what there is."
        )
    Columns(folder, manifest).check_files()
    return Store(folder, manifest)


def _dtype(name: str) -> np.dtype:
    if name not in NUMPY:
        raise ArgumentError(f"dtype={name!r}: one of {', '.join(NUMPY)} was expected.")
    return NUMPY[name]


def _words(key: Any) -> tuple[int, ...]:
    """The numbers that a key is made of."""
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return tuple(np.asarray(data).reshape(-1).tolist())
