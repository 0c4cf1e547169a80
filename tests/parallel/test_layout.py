"""Which axis of each parameter is split, by the names in its annotation."""

import jax

import mechjax as mj
from mechjax.models import Config
from mechjax.parallel.layout import layout


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
