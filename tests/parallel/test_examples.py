"""Where activations lie on a mesh that shares weights and examples."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mechjax as mj
from mechjax.parallel.examples import over_examples
from tests.tolerances import TOL

MESH = TOL["float32", "mesh"]


@pytest.fixture(scope="module")
def mesh():
    return mj.make_mesh(data=1, fsdp=4, model=2)


def test_forward__on_a_mesh_with_fsdp__keeps_examples_apart_and_equals_one_device(
    mesh, tiny_model, tiny_tokens
):
    model, tokens = mj.shard(tiny_model, mesh), mj.shard(tiny_tokens, mesh, axes="batch pos")
    expected = tiny_model(tiny_tokens)
    np.testing.assert_allclose(model(tokens), expected, **MESH)
    with jax.set_mesh(mesh):
        logits, acts = mj.capture(model, ["resid_post"])(tokens)
    np.testing.assert_allclose(logits, expected, **MESH)
    resid = acts["resid_post"]
    assert {shard.data.shape for shard in resid.addressable_shards} == {(3, 1, 6, 16)}


def test_over_examples__without_such_a_mesh_or_a_batch_that_divides__is_the_same_array(mesh):
    x = jax.numpy.ones((4, 6, 16))
    assert over_examples(x) is x
    with jax.set_mesh(mesh):
        assert over_examples(x[:3]).shape == (3, 6, 16) and over_examples(x[0]).ndim == 2
        whole = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
        assert jax.jit(over_examples)(whole).sharding.spec[0] in ("fsdp", ("data", "fsdp"))
    with jax.set_mesh(mj.make_mesh(data=4, model=2)):
        assert over_examples(x) is x
