"""The arrays of an .npz file: numbers alone, every size checked before anything is allocated.

`numpy.load` allocates what a header claims, inflates what a zip holds however much that is, and fails with errors of
many types. Here whatever a hostile file says ends in a `CheckpointError`.

Reference: NumPy's format specification ("NPY format"), versions 1 to 3.
"""

import io
import math
import zipfile
from pathlib import Path

import numpy as np

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats.zip_file import BROKEN

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_LARGEST_RATIO = 100  # of a member's size to its compressed size; weights do not compress
_SMALL = 1 << 20


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of the file, by name.

    Raises:
        CheckpointError: Missing, truncated, compressed beyond belief, or holding anything but arrays of numbers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            names = [info.filename for info in infos]
            if len(set(names)) < len(names):
                raise CheckpointError(
                    f"`{path}` has two members of one name, so which one counts is undefined."
                )
            return {info.filename.removesuffix(".npy"): _member(archive, info, path) for info in infos}
    except CheckpointError:
        raise
    except BROKEN as error:
        if not path.is_file():
            raise CheckpointError(f"There is no file `{path}`.") from None
        raise CheckpointError(f"`{path}` is truncated or no .npz file: {error}. Download it again.") from None


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    what = f"`{info.filename[:80]}` of `{path}`"
    if info.file_size > max(_SMALL, _LARGEST_RATIO * info.compress_size):
        raise CheckpointError(
            f"{what} claims {info.file_size} bytes, compressed to {info.compress_size}: no weights compress so well. "
            "Do not open files from sources that you do not trust."
        )
    data = io.BytesIO(archive.read(info))
    try:
        version = np.lib.format.read_magic(data)
        if version not in _HEADERS:
            raise CheckpointError(
                f"{what} has version {version} of numpy's format; mechjax reads 1.0 and 2.0."
            )
        shape, fortran, dtype = _HEADERS[version](data)
    except (ValueError, SyntaxError, TypeError) as error:
        raise CheckpointError(f"{what} is no array: {error}.") from None
    if dtype.kind not in "fiub":
        raise CheckpointError(
            f"{what} has the dtype {dtype}; numbers were expected. Objects are never unpickled."
        )
    rest = data.getbuffer()[data.tell() :]
    if len(shape) > 32 or any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(rest):
        raise CheckpointError(
            f"{what} has the shape {str(shape)[:80]} in {dtype} but holds {len(rest)} bytes. Download it again."
        )
    flat = np.frombuffer(rest, dtype)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
