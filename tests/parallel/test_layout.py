"""Which axis of each parameter is split, by the names in its annotation."""

import jax
import pytest

import mechjax as mj
from mechjax.base.errors import ArgumentError
from mechjax.models import Config
from mechjax.parallel.layout import layout, split


def _layout(n_model):
    config = Config(d_vocab=50, n_ctx=8, d_model=16, n_layers=3, n_heads=8, n_kv_heads=2, d_head=4, d_mlp=32)
    shapes = jax.eval_shape(lambda key: mj.init(config, key=key), jax.random.key(0))
    return layout(shapes, {"model": n_model})


def test_layout__of_a_decoder__splits_heads_neurons_and_vocabulary():
    found = _layout(2)
    assert found.blocks.attn.W_Q == (None, None, "model", None)
    assert found.blocks.attn.W_K == (None, None, "model", None)
    assert found.blocks.attn.b_Q == (None, "model", None)
    assert found.blocks.attn.W_O == (None, "model", None, None)
    assert found.blocks.mlp.W_in == (None, None, "model")
    assert found.W_E == ("model", None)
    assert found.W_pos == (None, None)


def test_layout__of_what_does_not_divide__is_whole():
    found = _layout(4)
    assert found.blocks.attn.W_K == (None, None, None, None)  # two key heads on four devices
    assert found.blocks.attn.W_Q == (None, None, "model", None)
    assert found.W_E == (None, None)  # 50 tokens


def test_layout__of_arrays_without_names__is_whole(tiny_model):
    assert layout({"w": jax.ShapeDtypeStruct((8, 8), "float32")}, {"model": 2}) == {"w": (None, None)}
    inside = layout(mj.intervene(tiny_model, mj.zero("z", layer=1)), {"model": 2})
    assert inside.fn.blocks.mlp.W_in == (None, None, "model")
    assert inside.edits[0].layer == ()


def test_split__by_axes_of_a_mesh_beside_data_and_model__takes_the_first_that_an_array_has():
    sizes = {"data": 2, "fsdp": 2, "sequence": 3, "expert": 4, "model": 2}
    assert split(("batch", "pos"), (8, 6), sizes) == (("data", "fsdp"), "sequence")
    assert split(("layer", "d_model", "head", "d_head"), (3, 16, 4, 4), sizes) == (
        None,
        "fsdp",
        "model",
        None,
    )
    assert split(("layer", "expert", "d_model", "d_mlp"), (3, 8, 16, 4), sizes) == (
        None,
        "expert",
        "fsdp",
        "model",
    )
    assert split(("layer", "expert", "d_model", "d_mlp"), (3, 8, 16, 4), {"model": 2}) == (
        None,
        "model",
        None,
        None,
    )
    assert split(("d_model",), (16,), {"data": 2, "model": 2}) == (None,)


@pytest.mark.parametrize(
    ("names", "shape", "sizes", "message"),
    [
        (("batch",), (6,), {"data": 4}, "`batch` has 6, which data=4 devices.*1, 2, 3, 6 devices can"),
        (("batch",), (6,), {"data": 2, "fsdp": 2}, "`batch` has 6, which data=2 x fsdp=2 devices"),
        (("head",), (6,), {"model": 4}, "`head` has 6, which model=4 devices"),
        (("expert",), (6,), {"expert": 4}, "`expert` has 6, which expert=4 devices"),
    ],
)
def test_split__of_what_does_not_divide__says_what_would(names, shape, sizes, message):
    with pytest.raises(ArgumentError, match=message):
        split(names, shape, sizes)


def test_layout__of_what_is_in_containers__is_told_by_itself(tiny_model):
    found = layout([{"of": tiny_model}, (tiny_model,)], {"model": 2})
    assert found[0]["of"].blocks.mlp.W_in == (None, None, "model") == found[1][0].blocks.mlp.W_in
