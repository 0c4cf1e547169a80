"""What verifying an artefact found."""

import equinox as eqx
import numpy as np
from jaxtyping import Bool, Int

from mechjax.artefacts.found import Found
from mechjax.base.provenance import Provenance
from mechjax.base.records import Record


class Verified(Record):
    """Which files of an artefact are what was written.

    Attributes:
        whole: Whether each file is.
        sizes: Bytes of each; 0 of one that is missing.
        kind: What the artefact is.
        files: Names of the files from the artefact's folder.
        problems: What is wrong, a line for each file that is not whole, with the arrays in it that are not.
        notes: What is no damage and yet worth knowing, such as that writing is not done.
        summed: Whether there are checksums of all of it; without, `whole` says only that nothing contradicts itself.
        provenance: Where it comes from; several where parts come from several places, none where nothing says so.
    """

    whole: Bool[np.ndarray, "file"]
    sizes: Int[np.ndarray, "file"]
    kind: str = eqx.field(static=True)
    files: tuple[str, ...] = eqx.field(static=True)
    problems: tuple[str, ...] = eqx.field(static=True)
    notes: tuple[str, ...] = eqx.field(static=True)
    summed: bool = eqx.field(static=True)
    provenance: tuple[Provenance, ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the files."""
        return {"file": self.files}

    @property
    def ok(self) -> bool:
        """Whether all of it is what was written, as far as there are checksums (`summed`)."""
        return bool(self.whole.all())

    @property
    def damaged(self) -> tuple[str, ...]:
        """The files that are not."""
        return tuple(name for name, whole in zip(self.files, self.whole, strict=True) if not whole)


def verified(kind: str, found: Found) -> Verified:
    """What was found, as a record."""
    lines = tuple(
        f"{file.name} {file.problem}" + (f" ({', '.join(file.arrays)})" if file.arrays else "")
        for file in found.files
        if file.problem
    )
    return Verified(
        np.array([not file.problem for file in found.files], bool),
        np.array([file.size for file in found.files], np.int64),
        kind,
        tuple(file.name for file in found.files),
        lines,
        found.notes,
        found.summed,
        found.provenance,
    )
