"""Read a whole store again, and say which shards are not what was written."""

from pathlib import Path

import equinox as eqx
import numpy as np
from jaxtyping import Bool

from mechjax.base.errors import CheckpointError
from mechjax.base.progress import bar
from mechjax.base.records import Record
from mechjax.store.arrays import Columns, metadata_whole
from mechjax.store.manifest import read_manifest


class Verification(Record):
    """Which shards of a store are what was written.

    Attributes:
        whole: Whether each shard of each column is.
        columns: Names of the columns.
        problems: What is wrong, in words, one entry for each shard of a column, and for each file of metadata.
    """

    whole: Bool[np.ndarray, "shard column"]
    columns: tuple[str, ...] = eqx.field(static=True)
    problems: tuple[str, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the columns."""
        return {"column": self.columns}

    @property
    def damaged(self) -> tuple[int, ...]:
        """The shards of which some column is not whole."""
        return tuple(np.flatnonzero(~self.whole.all(1)).tolist())


def verify(folder: str | Path) -> Verification:
    """Read every row of a store, and compare with the checksums that were kept when it was written.

    A chunk's CRC-32C finds what is damaged, and the SHA-256 of a shard's rows also what was put in another's place.

    Args:
        folder: What `mechjax.store.write` wrote; it need not be complete.

    Returns:
        What is whole and what is not; nothing is changed. `mechjax.store.repair` writes again what is not.

    Raises:
        CheckpointError: No store, one of another version, or a manifest that is not whole: then nothing can be said.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    columns, names = Columns(folder, manifest), manifest.specification.columns
    whole, problems = np.ones((len(manifest.shards), len(names)), bool), []
    with bar("Verifying shards", whole.size, compiles=False) as progress:
        for shard, column in np.ndindex(whole.shape):
            try:
                columns.shard(column, shard)
            except CheckpointError as error:
                whole[shard, column] = False
                problems.append(str(error))
            progress.advance()
    if manifest.complete:
        problems += [
            f"the metadata of {name} for other readers (`zarr.json`) are missing or were changed."
            for i, name in enumerate(names)
            if not metadata_whole(folder, manifest, i)
        ]
    return Verification(whole, tuple(str(name) for name in names), tuple(problems))
