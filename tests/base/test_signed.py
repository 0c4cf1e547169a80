"""JSON with a checksum: every bit of it counts, and pages that were written before are still read."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechjax.base.signed import page_digest, signed, unsigned

PAGE = {"b": [1e-05, -0.0, 1e22, {"x": None}], "a": "ä\n\u2028\\/", "n": {"deep": [[], {}]}, "rows": [1, 2]}
LAYOUTS = ("compact", "indented", "lines")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_signed__of_any_layout__comes_back(layout):
    assert unsigned(signed(PAGE, layout)) == PAGE


@given(page=st.dictionaries(st.text(max_size=4).filter(lambda key: key != "sha256"), JSON, max_size=4))
def test_signed__of_any_json__comes_back(page):
    for layout in LAYOUTS:
        assert unsigned(signed(page, layout)) == page


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unsigned__with_any_bit_flipped__is_refused(layout):
    """Exhaustive. `1e-05` and `1E-05`, `\\u00e4` and `\\u00E4` say the same in one bit more."""
    data = signed(PAGE, layout)
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"is not whole|was changed after it was written"):
            unsigned(bytes(flipped))


def test_unsigned__of_text_that_says_the_same_otherwise__is_refused():
    data = signed({"a": 1e-05})
    assert b"1e-05" in data
    with pytest.raises(ValueError, match="its text is none that mechjax writes"):
        unsigned(data.replace(b"1e-05", b"1E-05"))
    with pytest.raises(ValueError, match="its checksum differs"):
        unsigned(data.replace(b"1e-05", b"2e-05"))


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"[1]", "it holds a list"), (b"{", "is not whole: Expecting"), (b"[" * 100_000, "nests too deeply|is not whole"),
     (b'{"a": NaN}', "was changed|Out of range"), (b"", "is not whole")],
)  # fmt: skip
def test_unsigned__of_anything_else__is_refused(data, said):
    with pytest.raises(ValueError, match=said):
        unsigned(data)


def test_unsigned__of_pages_of_earlier_versions__reads_them():
    """A record (checksum first), a manifest (sorted) and a checkpoint's page (checksum last), as they were written."""
    digest = hashlib.sha256(json.dumps(PAGE, sort_keys=True).encode()).hexdigest()
    assert digest == page_digest(PAGE)
    record = json.dumps({"sha256": digest, **PAGE}, indent=1, allow_nan=False)
    text = json.dumps(PAGE, sort_keys=True)
    manifest = f'{text[:-1]}, "sha256": "{digest}"}}'
    for written in (record, manifest, json.dumps(PAGE | {"sha256": digest})):
        assert unsigned(written.encode()) == PAGE


def test_signed__of_what_is_not_finite__is_refused():
    with pytest.raises(ValueError, match="Out of range float"):
        signed({"a": float("nan")})
