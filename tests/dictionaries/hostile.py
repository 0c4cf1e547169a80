"""Files of torch.save and numpy put together byte by byte, as nobody honest would."""

import io
import struct
import zipfile

import numpy as np


def text(x: str) -> bytes:
    return b"X" + struct.pack("<I", len(x.encode())) + x.encode()


def whole(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def tuple_(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def storage(key="0", count=4, kind="FloatStorage") -> bytes:
    return tuple_(text("storage"), name("torch", kind), text(key), text("cpu"), whole(count)) + b"Q"


def tensor(shape=(4,), strides=(1,), start=0, of: bytes | None = None) -> bytes:
    given = tuple_(
        storage() if of is None else of,
        whole(start),
        tuple_(*map(whole, shape)),
        tuple_(*map(whole, strides)),
        b"\x89",
        name("collections", "OrderedDict") + b")R",
    )
    return name("torch._utils", "_rebuild_tensor_v2") + given + b"R"


def state(**values: bytes) -> bytes:
    """A pickle of a dict."""
    return b"\x80\x02}" + b"".join(text(key) + value + b"s" for key, value in values.items()) + b"."


def torch_zip(path, pickle: bytes, *, members=None, compress=zipfile.ZIP_STORED, root="archive"):
    """A file of torch.save with this pickle; four numbers in its one storage, unless told otherwise."""
    held = {"data.pkl": pickle, "byteorder": b"little", "data/0": np.arange(4, dtype="<f4").tobytes()}
    with zipfile.ZipFile(path, "w", compress) as archive:
        for key, data in (held | (members or {})).items():
            if data is not None:
                archive.writestr(f"{root}/{key}", data)
    return path


def npy(header: str, data: bytes, version=(1, 0)) -> bytes:
    """A file of numpy's format with this header, whatever it says."""
    line = header.encode() + b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(line)) + line + data


def npz(path, members: dict[str, bytes], compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compress) as archive:
        for key, data in members.items():
            archive.writestr(key, data)
    return path


def saved(array: np.ndarray) -> bytes:
    """A file of numpy's format, by numpy."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()
