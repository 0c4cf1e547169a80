"""Safetensors files, genuine and hostile: every outcome is a checked view or a CheckpointError."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save, save_file

from mechjax.base.errors import CheckpointError
from mechjax.hub.tensor_file import TensorFile

BOTH = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.int64)}
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw(header, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def claim(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def read(tmp_path, content: bytes) -> TensorFile:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return TensorFile(path)


DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int8, np.int64, np.bool_, np.uint16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_tensor_file__every_dtype__equals_what_the_library_wrote(tmp_path, dtype):
    arrays = {
        "w": np.arange(12).reshape(3, 4).astype(dtype),
        "empty": np.zeros((0, 4), dtype),
        "": np.ones((), dtype),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert set(file.entries) == set(arrays)
    for name, array in arrays.items():
        assert file[name].dtype == array.dtype
        assert file[name].shape == array.shape
        assert file[name].tobytes() == array.tobytes()


def test_tensor_file__values__are_read_only_views(tmp_path):
    save_file(BOTH, tmp_path / "x.safetensors")
    view = TensorFile(tmp_path / "x.safetensors")["a"]
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_tensor_file__data_off_alignment__is_read(tmp_path):
    file = read(
        tmp_path, raw({"h": claim("U8", (1,), (0, 1)), "f": claim("F32", (2,), (1, 9))}, b"\1" + bytes(8))
    )
    np.testing.assert_array_equal(file["f"], [0, 0])


def test_tensor_file__unknown_name__suggests_the_close_one(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no tensor `blok`. Did you mean `block`"):
        read(tmp_path, save({"block": BOTH["a"]}))["blok"]


TWICE = json.dumps(claim()).encode()
HOSTILE = {
    "empty file": (b"", "Cannot read"),
    "no length": (b"\1\2", "2 bytes cannot hold a safetensors header length"),
    "length past the end": (raw({}, length=50), "its header claims 50 bytes, 2 follow"),
    "length of 2**63": (raw({}, length=2**63), "its header claims 9223372036854775808 bytes"),
    "not JSON": (raw(b"{'a'"), "is not valid JSON"),
    "not UTF-8": (raw(b"\xff\xfe\xff"), "is not valid JSON"),
    "not an object": (raw(b"[1]"), "holds a JSON list; an object was expected"),
    "nested deeply": (raw(b"[" * 100_000), "nests JSON too deeply"),
    "number of 10,000 digits": (raw(b'{"a":' + b"9" * 10_000 + b"}"), "is not valid JSON"),
    "name twice": (raw(b'{"a":' + TWICE + b',"a":' + TWICE + b"}", bytes(8)), "has the key `a` twice"),
    "no shape": (
        raw({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)),
        "lacks its dtype, shape or data",
    ),
    "entry is a number": (raw({"a": 3}), "lacks its dtype"),
    "unknown dtype": (raw({"a": claim("F99")}, bytes(8)), "has the dtype 'F99'; known are BOOL, U8"),
    "dtype is a list": (raw({"a": claim([])}, bytes(8)), r"has the dtype \[\]"),
    "negative size": (raw({"a": claim(shape=(-2,))}, bytes(8)), r"has the shape \[-2\]"),
    "fractional size": (raw({"a": claim(shape=(2.0,))}, bytes(8)), r"has the shape \[2.0\]"),
    "size is true": (raw({"a": claim("U8", (True,), (0, 1))}, bytes(1)), r"has the shape \[True\]"),
    "500 axes": (
        raw({"a": claim("U8", (1,) * 500, (0, 1))}, bytes(1)),
        r"has the shape \[1, 1.*\.\.\.; a short list",
    ),
    "huge size": (raw({"a": claim(shape=(2**40, 2**40))}, bytes(8)), r"absurd shape \[1099511627776"),
    "huge size hidden by a zero": (raw({"a": claim(shape=(0, 2**62), offsets=(0, 0))}), "absurd shape"),
    "bytes do not fit shape": (
        raw({"a": claim(shape=(3,))}, bytes(8)),
        "in F32, 12 bytes, but its offsets span 8",
    ),
    "offsets swapped": (
        raw({"a": claim(offsets=(8, 0))}, bytes(8)),
        r"the offsets \[8, 0\]; \[start, stop\]",
    ),
    "three offsets": (raw({"a": claim(offsets=(0, 8, 9))}, bytes(8)), r"the offsets \[0, 8, 9\]"),
    "data missing": (
        raw({"a": claim()}, bytes(4)),
        r"is truncated: its tensor `a` ends at byte \d+, the file at",
    ),
    "overlap": (
        raw({"a": claim(), "b": claim(offsets=(4, 12))}, bytes(12)),
        "Tensors `a` and `b` of .* overlap",
    ),
    "gap": (raw({"a": claim(offsets=(4, 12))}, bytes(12)), "4 bytes of .* before `a` belong to no tensor"),
    "bytes after the last": (
        raw({"a": claim()}, bytes(12)),
        "4 bytes after its last tensor that belong to none",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_tensor_file__hostile_header__is_refused_by_name(tmp_path, case):
    content, message = HOSTILE[case]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, content)


def test_tensor_file__missing__says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot read .*nowhere.safetensors"):
        TensorFile(tmp_path / "nowhere.safetensors")


GOOD = save(BOTH)


def agrees_with_the_library(tmp_path, content: bytes) -> None:
    """Either a CheckpointError, or the library accepts the file too and sees the same bytes."""
    try:
        file = read(tmp_path, content)
    except CheckpointError:
        return
    theirs, refusal = {}, ""
    try:
        with safe_open(tmp_path / "x.safetensors", "numpy") as reference:
            theirs = {name: reference.get_tensor(name) for name in reference.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, AttributeError) as error:
        refusal = str(error)
    if refusal:  # metadata that is no text does not matter here; the library's numpy side lacks float8
        assert re.search(r"metadata|invalid JSON|float8", refusal), refusal
    else:
        ours = {name: file[name] for name in file.entries}
        assert _bytes(ours) == _bytes(theirs)


def _bytes(arrays) -> dict:
    return {name: (array.shape, array.tobytes()) for name, array in arrays.items()}


@FUZZ
@given(st.integers(0, len(GOOD) - 1))
def test_tensor_file__truncated_anywhere__is_refused(tmp_path, length):
    with pytest.raises(CheckpointError, match=r"truncated|Cannot read"):
        read(tmp_path, GOOD[:length])


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_tensor_file__mutated_bytes__fail_typed_or_agree_with_the_library(tmp_path, changes):
    content = bytearray(GOOD)
    for place, value in changes:
        content[place] = value
    agrees_with_the_library(tmp_path, bytes(content))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**66) | st.floats(allow_nan=True) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
CLAIM = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F8_E4M3", "F4"]) | JSON,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 9), st.integers(0, 17)) | JSON,
    }
)


@FUZZ
@given(st.dictionaries(st.text(max_size=3), CLAIM | JSON, max_size=3), st.integers(0, 17))
def test_tensor_file__drawn_header__fails_typed_or_agrees_with_the_library(tmp_path, header, size):
    agrees_with_the_library(tmp_path, raw(header, bytes(size)))
