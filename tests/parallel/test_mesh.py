"""The same numbers on eight simulated devices."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mechjax as mj
from mechjax.base.errors import ArgumentError
from tests.tolerances import TOL

MESH = TOL["float32", "mesh"]


@pytest.fixture(scope="module")
def mesh():
    return mj.make_mesh(data=2, model=4)


@pytest.fixture(scope="module")
def sharded(mesh, tiny_model):
    """Heads and neurons over `model`, everything else whole."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = PartitionSpec()
        if any(w in name for w in (".W_Q", ".W_K", ".W_V")):
            spec = PartitionSpec(None, None, "model", None)
        elif ".W_O" in name or ".W_out" in name:
            spec = PartitionSpec(None, "model", None)
        elif ".W_in" in name:
            spec = PartitionSpec(None, None, "model")
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, tiny_model)


def test_mesh__forward_capture_edit_and_sweep__equal_one_device(mesh, sharded, tiny_model, tiny_tokens):
    tokens = jax.device_put(tiny_tokens, NamedSharding(mesh, PartitionSpec("data")))
    sites = ["z", "mlp_post", "resid_post"]
    edits = [mj.replace("z", np.ones(4), layer=1, head=3, pos=-1), mj.scale("mlp_post", 0.5, layer=2)]
    logits, acts = mj.capture(sharded, sites)(tokens)
    expected, whole = mj.capture(tiny_model, sites)(tiny_tokens)
    np.testing.assert_allclose(logits, expected, **MESH)
    for site in sites:
        np.testing.assert_allclose(acts[site], whole[site], **MESH)
    assert "data" in str(acts["z"].sharding) and len(acts["z"].sharding.device_set) == 8
    np.testing.assert_allclose(
        mj.intervene(sharded, edits)(tokens), mj.intervene(tiny_model, edits)(tiny_tokens), **MESH
    )
    metric = mj.metrics.logit_diff(1, 2)
    other = tiny_tokens[::-1]
    swept = mj.patching.activation_patch(
        sharded, tokens, jax.device_put(other, tokens.sharding), metric, site="resid_pre"
    )
    alone = mj.patching.activation_patch(tiny_model, tiny_tokens, other, metric, site="resid_pre")
    np.testing.assert_allclose(swept.per_example, alone.per_example, **MESH)


def test_make_mesh__axes_and_refusals(mesh):
    assert mesh.shape == {"data": 2, "model": 4}
    assert mj.make_mesh(model=2).shape == {"data": 4, "model": 2}
    with pytest.raises(ArgumentError, match="sizes must be positive"):
        mj.make_mesh(data=0)
    with pytest.raises(ArgumentError, match="8 devices cannot be split into rows of 3"):
        mj.make_mesh(model=3)
    with pytest.raises(ArgumentError, match="needs 16 devices; 8 are here"):
        mj.make_mesh(data=4, model=4)
