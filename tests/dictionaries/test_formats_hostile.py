"""Files that are broken, or made to do harm: each is refused with a typed error, and nothing of it runs."""

import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from mechjax.base.errors import CheckpointError
from mechjax.dictionaries.formats.flat_yaml import read_flat_yaml
from mechjax.dictionaries.formats.npz_file import read_npz
from mechjax.dictionaries.formats.torch_file import read_torch
from tests.dictionaries.hostile import (
    name,
    npy,
    npz,
    saved,
    state,
    storage,
    tensor,
    text,
    torch_zip,
    tuple_,
    whole,
)
from tests.dictionaries.places import place


class Runs:
    """What a pickle would run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


# ---- torch.save ----------------------------------------------------------------------------------------------------------


def test_read_torch__of_a_plain_file__gives_views_and_plain_values(tmp_path):
    values = {
        "flat": tensor(),
        "square": tensor((2, 2), (1, 2)),
        "part": tensor((2,), (1,), start=2),
        "scalar": tensor((), ()),
        "k": whole(7),
        "name": text("TopK"),
        "none": b"N",
        "yes": b"\x88",
        "list": b"](" + whole(1) + whole(2) + b"e",
        "ordered": name("collections", "OrderedDict") + b")R}b",
        "parameter": name("torch._utils", "_rebuild_parameter") + tuple_(tensor(), b"\x88", b"N") + b"R",
    }
    found = read_torch(torch_zip(tmp_path / "x.pt", state(**values)))
    assert_array_equal(found["flat"], [0, 1, 2, 3])
    assert_array_equal(found["square"], [[0, 2], [1, 3]])
    assert_array_equal(found["part"], [2, 3])
    assert_array_equal(found["parameter"], [0, 1, 2, 3])
    assert found["scalar"] == 0 and found["scalar"].shape == ()
    plain = {"k": 7, "name": "TopK", "none": None, "yes": True, "list": [1, 2], "ordered": {}}
    assert {key: found[key] for key in plain} == plain
    assert not found["flat"].flags.writeable


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_read_torch__of_a_pickle_that_runs_something__refuses_and_runs_nothing(protocol, tmp_path):
    target = tmp_path / "made"
    torch_zip(tmp_path / "x.pt", pickle.dumps({"a": Runs(target)}, protocol))
    with pytest.raises(CheckpointError, match=r"it names `posix\.mkdir`|the opcode|it names `nt"):
        read_torch(tmp_path / "x.pt")
    assert not target.exists()


NAMES = [
    "builtins.eval",
    "os.system",
    "torch.load",
    "torch._utils._rebuild_tensor",
    "torch.nn.Linear",
    "numpy.load",
]


@pytest.mark.parametrize("full", NAMES)
def test_read_torch__of_other_names__refuses_each(full, tmp_path):
    module, attribute = full.rsplit(".", 1)
    for spelled in (name(module, attribute), text(module) + text(attribute) + b"\x93"):
        path = torch_zip(tmp_path / "x.pt", state(a=spelled + text("x") + b"\x85R"))
        with pytest.raises(CheckpointError, match=f"it names `{full}`.*no code is run"):
            read_torch(path)


BROKEN = {
    "function that is a text": (text("os.system") + tuple_() + b"R", "it calls `str`"),
    "storage that is called": (storage() + b")R", "it calls `_Storage`"),
    "ordered dict of pairs": (name("collections", "OrderedDict") + tuple_(b"]") + b"R", "it calls"),
    "parameter of a text": (
        name("torch._utils", "_rebuild_parameter") + tuple_(text("x"), b"\x88") + b"R",
        "it calls",
    ),
    "state of a tensor": (tensor() + b"}b", "sets the state of an object"),
    "state with attributes": (
        name("collections", "OrderedDict") + b")R}" + text("__class__") + text("x") + b"sb",
        "sets the state of an object",
    ),
    "object": (name("collections", "OrderedDict") + b")\x81", "the opcode NEWOBJ"),
    "instance": (b"(ios\nsystem\n", "the opcode INST"),
    "extension": (b"\x82\x01", "the opcode EXT1"),
    "item of a list": (b"]" + text("a") + text("b") + b"s", "sets items of what is no dict"),
    "key that is a list": (b"}]" + text("b") + b"s", "a key of type list"),
    "append to a dict": (b"}" + text("a") + b"a", "appends to what is no list"),
    "append to a tuple": (b")" + text("a") + b"a", "appends to what is no list"),
    "memo that is not there": (b"h\x07", "truncated or broken"),
    "mark that is not there": (b"t", "truncated or broken"),
    "mark that is taken": (b"(\x85", "truncated or broken"),
    "stack that is empty": (b"000", "the opcode POP"),
    "tensor of a text": (tensor(of=text("x")), "it has a tensor of shape"),
    "tensor of floats": (
        name("torch._utils", "_rebuild_tensor_v2")
        + tuple_(storage(), b"G" + struct.pack(">d", 0.0), tuple_(whole(1)), tuple_(whole(1)))
        + b"R",
        "it has a tensor of shape",
    ),
    "tensor of nothing": (
        name("torch._utils", "_rebuild_tensor_v2") + tuple_() + b"R",
        "truncated or broken",
    ),
    "tensor beyond its storage": (tensor((5,)), "a storage of 4"),
    "tensor that starts beyond": (tensor((1,), start=4), "a storage of 4"),
    "tensor that starts before": (tensor((1,), start=-1), "it has a tensor of shape"),
    "tensor with a stride beyond": (tensor((2,), (4,)), "a storage of 4"),
    "tensor with a negative stride": (tensor((2,), (-1,)), "it has a tensor of shape"),
    "tensor that repeats numbers": (tensor((1 << 20, 1 << 20), (0, 0)), "a storage of 4"),
    "tensor of negative size": (tensor((-4,)), "it has a tensor of shape"),
    "tensor of no size": (tensor((0, 1 << 30), (1, 1)), "a storage of 4"),
    "tensor of many axes": (tensor((1,) * 9, (1,) * 9), "a storage of 4"),
    "tensor with fewer strides": (tensor((2, 2), (1,)), "truncated or broken"),
    "storage of other size": (storage(count=3), "has 16 bytes, 3 numbers were claimed"),
    "storage of other kind": (storage(kind="DoubleStorage"), "has 16 bytes, 4 numbers were claimed"),
    "storage in two ways": (storage() + b"0" + storage(kind="IntStorage"), "the opcode POP"),
    "storage of no kind": (
        tuple_(text("storage"), text("x"), text("0"), text("cpu"), whole(4)) + b"Q",
        "persistent id",
    ),
    "storage of a dict": (
        tuple_(text("storage"), name("collections", "OrderedDict"), text("0"), text("cpu"), whole(4)) + b"Q",
        "persistent id",
    ),
    "persistent id of two": (tuple_(text("storage"), text("x")) + b"Q", "truncated or broken"),
    "storage that is a path": (storage(key="../../etc/passwd"), "persistent id"),
    "storage in other digits": (storage(key="٣"), "persistent id"),
    "storage with a long number": (storage(key="1" * 4000), "persistent id"),
    "storage that is not there": (storage(key="7"), "lacks its member `data/7`"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_read_torch__of_a_pickle_that_is_no_state_dict__is_refused(case, tmp_path):
    value, said = BROKEN[case]
    path = torch_zip(tmp_path / "x.pt", state(a=value))
    with pytest.raises(CheckpointError, match=said):
        read_torch(path)


def test_read_torch__of_a_storage_described_twice__is_refused(tmp_path):
    path = torch_zip(tmp_path / "x.pt", state(a=storage(), b=storage(kind="IntStorage")))
    with pytest.raises(CheckpointError, match="describes its storage 0 in two ways"):
        read_torch(path)


@pytest.mark.parametrize(
    "cut", [b"", b"\x80\x02", state(a=tensor())[:-1], state(a=tensor())[:40], b"\x80\x02}}."]
)
def test_read_torch__of_a_pickle_that_is_cut__is_refused(cut, tmp_path):
    with pytest.raises(CheckpointError, match="truncated or broken"):
        read_torch(torch_zip(tmp_path / "x.pt", cut))


def test_read_torch__of_every_beginning_of_a_real_file__is_refused(tmp_path):
    whole_file = (place("dictionary_learning/top_k") / "ae.pt").read_bytes()
    for length in range(0, len(whole_file) - 1, 97):
        (tmp_path / "x.pt").write_bytes(whole_file[:length])
        with pytest.raises(
            CheckpointError, match=r"is truncated or no file of torch\.save.*Download it again"
        ):
            read_torch(tmp_path / "x.pt")


def test_read_torch__of_a_real_file_with_a_byte_changed__gives_numbers_or_a_typed_error(tmp_path):
    original, rng = (place("dictionary_learning/top_k") / "ae.pt").read_bytes(), np.random.default_rng(0)
    refused = 0
    for at in rng.choice(len(original), 300, replace=False):
        changed = bytearray(original)
        changed[at] ^= 1 << rng.integers(8)
        (tmp_path / "x.pt").write_bytes(changed)
        try:
            assert isinstance(read_torch(tmp_path / "x.pt"), dict)
        except CheckpointError:
            refused += 1
    assert refused > 100  # the rest lies in padding


def test_read_torch__of_zips_that_torch_does_not_write__is_refused(tmp_path):
    good, path = state(a=tensor()), tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="is compressed or claims"):
        read_torch(torch_zip(path, good + b"\0" * 5000, compress=zipfile.ZIP_DEFLATED))
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch(torch_zip(path, good, members={"byteorder": b"big"}))
    with pytest.raises(CheckpointError, match="lacks its member `data/0`"):
        read_torch(torch_zip(path, good, members={"data/0": None}))
    with pytest.raises(CheckpointError, match=r"holds 2 files `data\.pkl`"):
        read_torch(torch_zip(path, good, members={"x/data.pkl": good}))
    with pytest.raises(CheckpointError, match=r"holds 0 files `data\.pkl`"):
        read_torch(torch_zip(path, good, members={"data.pkl": None}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's own, that the name stands twice
        with zipfile.ZipFile(path, "w") as archive:
            for data in (good, state(a=whole(1))):
                archive.writestr("archive/data.pkl", data)
    with pytest.raises(CheckpointError, match="two members of one name"):
        read_torch(path)


def test_read_torch__of_other_files__says_what_they_are(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="There is no file"):
        read_torch(path)
    path.write_bytes(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M")
    with pytest.raises(CheckpointError, match=r"torch before 1\.6.*torch\.save\(x, TO\)"):
        read_torch(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"no file of torch\.save"):
        read_torch(path)


# ---- npz -----------------------------------------------------------------------------------------------------------------


def header(shape, dtype="<f4", fortran=False):
    return repr({"descr": dtype, "fortran_order": fortran, "shape": shape})


def test_read_npz__of_arrays__gives_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)),
        "b": np.asfortranarray(rng.normal(size=(3, 4))),
        "c": np.float32(2),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        found = read_npz(tmp_path / "x.npz")
        assert found.keys() == arrays.keys()
        for key, array in arrays.items():
            assert_array_equal(found[key], array)
            assert found[key].shape == np.shape(array)


LIES = {
    "objects": (saved(np.array([Runs("x"), None], object)), "has the dtype object"),
    "text": (saved(np.array(["x"])), "has the dtype <U1"),
    "records": (saved(np.zeros(2, [("a", "f4")])), "has the dtype"),
    "complex": (saved(np.zeros(2, complex)), "has the dtype complex128"),
    "shape too large": (npy(header((1 << 40,)), b"\0" * 16), r"shape \(1099511627776,\) .* holds 16 bytes"),
    "shape too small": (npy(header((3,)), b"\0" * 16), r"shape \(3,\)"),
    "shape negative": (npy(header((-4, -1)), b"\0" * 16), r"shape \(-4, -1\)"),
    "shape overflowing": (npy(header((1 << 32, 1 << 32)), b""), "holds 0 bytes"),
    "many axes": (npy(header((1,) * 40), b"\0" * 4), "holds 4 bytes"),
    "header that is code": (npy("__import__('os').mkdir('x')", b""), "is no array"),
    "header without shape": (npy("{'descr': '<f4'}", b""), "is no array"),
    "header of floats": (npy(header((1.5,)), b"\0" * 8), "is no array"),
    "other dtype": (npy(header((1,), "<q99"), b"\0" * 8), "is no array"),
    "other version": (npy(header((1,)), b"\0" * 4, (9, 9)), "version|is no array"),
    "no array": (b"hello", "is no array"),
    "nothing": (b"", "is no array"),
}


@pytest.mark.parametrize("case", LIES)
def test_read_npz__of_members_that_lie__is_refused(case, tmp_path):
    data, said = LIES[case]
    with pytest.raises(CheckpointError, match=said):
        read_npz(npz(tmp_path / "x.npz", {"a.npy": data}))


def test_read_npz__of_a_bomb__is_refused_before_it_is_inflated(tmp_path):
    zeros = npy(header((1 << 22,)), bytes(1 << 24))
    with pytest.raises(CheckpointError, match="no weights compress so well"):
        read_npz(npz(tmp_path / "x.npz", {"a.npy": zeros}, zipfile.ZIP_DEFLATED))


def test_read_npz__of_files_that_are_none__is_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(CheckpointError, match="There is no file"):
        read_npz(path)
    np.savez(path, a=np.arange(9.0))
    good = path.read_bytes()
    for length in (0, 10, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"truncated or no \.npz file"):
            read_npz(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", saved(np.zeros(2)))
            archive.writestr("a.npy", saved(np.ones(2)))
    with pytest.raises(CheckpointError, match="two members of one name"):
        read_npz(path)


# ---- yaml ----------------------------------------------------------------------------------------------------------------


def test_read_flat_yaml__of_a_plain_config__gives_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "---\n# a comment\nmodel_name: google/gemma-2-2b  # mine\nscan: 'a: b'\nempty:\n"
        'quoted: "x"\ntranscoders:\n- hf://org/name/a.npz?revision=1\n  - two\nlast: 3.5\n'
    )
    assert read_flat_yaml(path) == {
        "model_name": "google/gemma-2-2b",
        "scan": "a: b",
        "empty": "",
        "quoted": "x",
        "transcoders": ["hf://org/name/a.npz?revision=1", "two"],
        "last": "3.5",
    }


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("a: !!python/object/apply:os.system [x]", "plain or simply quoted text only"),
        ("a: &x y", "plain or simply quoted"),
        ("a: *x", "plain or simply quoted"),
        ("a: [1, 2]", "plain or simply quoted"),
        ("a: {b: 1}", "plain or simply quoted"),
        ("a: |\n  text", "plain or simply quoted"),
        ("a: b: c", "plain or simply quoted"),
        ('a: "x\\n"', "plain or simply quoted"),
        ("a: 'x", "plain or simply quoted"),
        ("a:\n  b: 1", "line 2 .*lists of text only"),
        ("a: 1\na: 2", "`a` a second time"),
        ("a: 1\n- 2", "an item below `a`, which has a value"),
        ("- 1", "line 1 .*lists of text only"),
        ("just text", "lists of text only"),
    ],
)
def test_read_flat_yaml__of_more_than_that__is_refused(source, said, tmp_path):
    (tmp_path / "x.yaml").write_text(source)
    with pytest.raises(CheckpointError, match=said):
        read_flat_yaml(tmp_path / "x.yaml")


def test_read_flat_yaml__of_files_that_are_none__is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_flat_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"a: \xff")
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_flat_yaml(tmp_path / "x.yaml")
    (tmp_path / "x.yaml").write_bytes(b"#" * ((1 << 20) + 1))
    with pytest.raises(CheckpointError, match="larger than 1 MiB"):
        read_flat_yaml(tmp_path / "x.yaml")
