"""Is what lies on disk what was written."""

from pathlib import Path

from mechjax.artefacts.found import joined
from mechjax.artefacts.kinds import FILES, FOLDERS, Kind
from mechjax.artefacts.verified import Verified, verified
from mechjax.base.errors import ArgumentError


def verify(path: str | Path) -> Verified:
    """Recognise an artefact, hash all of it again, and name every file, and array in it, that is not what was written.

    Nothing is changed, loaded as a model or unpickled, no device is used, and large files are read piece by piece.
    Files that mechjax wrote have a checksum over every byte, so any flipped bit is found. Of a model that another
    library wrote there is none: whether its config, its index and the headers of its files agree is all that can be
    said, unless it lies in the Hub's cache, which names files by their checksum.

    Cost: reading all of it once (twice where damage is to be placed), at about 1 GB/s.

    Args:
        path: A folder that `mj.save`, `mj.store.write`, training with checkpoints, a sweep with a folder, `mj.export`
            or `write_saelens` wrote, or any model's in Hugging Face layout; or a circuit that `mj.graph.to_mib` wrote.

    Returns:
        What was found; `.ok` says whether all of it is whole.

    Raises:
        ArgumentError: Nothing is there, or nothing that is recognised; the message says what would be.
    """
    path = Path(path)
    if not path.exists():
        raise ArgumentError(f"there is nothing at `{path}`. Give a folder or file that mechjax wrote.")
    kinds = [kind for kind in (FOLDERS if path.is_dir() else FILES) if kind.fits(path)]
    if not kinds:
        raise ArgumentError(_unknown(path))
    return verified(
        " and ".join(kind.name for kind in kinds), joined(tuple(kind.check(path) for kind in kinds))
    )


def _unknown(path: Path) -> str:
    would = "; ".join(f"{kind.name}: {kind.told}" for kind in (*FOLDERS, *FILES))
    near = [path.parent] if path.is_file() else sorted(folder for folder in path.iterdir() if folder.is_dir())
    there = [folder for folder in near if _kinds(folder)]
    hint = f" Verify {', '.join(f'`{folder}`' for folder in there[:5])}." if there else ""
    return f"`{path}` holds nothing that has checksums of mechjax.{hint} What has: {would}."


def _kinds(folder: Path) -> list[Kind]:
    return [kind for kind in FOLDERS if kind.fits(folder)]
