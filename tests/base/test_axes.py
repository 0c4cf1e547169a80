import pytest

from mechjax.base.axes import AXES, label, names_from_annotation


@pytest.mark.parametrize(
    ("axes", "index", "expected"),
    [
        (("layer",), (2,), "L2"),
        (("layer", "head"), (2, 3), "L2.H3"),
        (("layer", "head", "pos"), (2, 3, 7), "L2.H3 @ 7"),
        (("layer", "d_mlp"), (0, 511), "L0.N511"),
        (("batch", "pos"), (1, 2), "batch=1 @ 2"),
        (("pos",), (4,), "@ 4"),
        ((), (), "all"),
    ],
)
def test_label__of_a_cell__reads_as_the_field_writes_it(axes, index, expected):
    assert label(axes, index) == expected


def test_label__with_names__uses_them():
    assert label(("layer", "pos"), (1, 0), {"pos": ("S2",)}) == "L1 @ S2"


@pytest.mark.parametrize(
    ("dims", "n_dims", "expected"),
    [
        ("layer head", 2, ("layer", "head")),
        ("*over batch", 3, ("layer", "pos", "batch")),
        ("*batch pos", 3, ("batch", "batch", "pos")),
        ("layer head", 3, None),
        ("*over batch", 4, None),
    ],
)
def test_names_from_annotation__of_a_field__splices_starred_names(dims, n_dims, expected):
    assert names_from_annotation(dims, n_dims, {"over": ("layer", "pos")}) == expected


def test_axes__the_vocabulary__has_the_words_of_the_design():
    words = "batch pos d_model head kv_head d_head query key d_mlp d_vocab layer feature expert edge node"
    assert set(words.split()) <= set(AXES)
