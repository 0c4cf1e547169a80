"""What is put on a mesh: split as the table says, equal in every number, and refused where it does not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.models.experts import Experts
from mechjax.models.export import export
from mechjax.models.params import parameters
from tests.attribution.conftest import SMALL, redrawn
from tests.attribution.transcoded import LLAMA
from tests.tolerances import TOL

BARE = {"qkv_bias": False, "out_bias": False, "mlp_bias": False, "norm_bias": False}
PLAIN = mj.models.Config(d_vocab=20, n_ctx=8, d_model=16, n_layers=2, n_heads=4, activation="gelu_new")
NEOX = {"positions": "rotary", "residual": "parallel", "tied": False, "activation": "gelu"}
ROTARY = mj.models.Config(
    d_vocab=20, n_ctx=8, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_mlp=12, norm="rms", positions="rotary",
    mlp="gated", tied=False, activation="silu", **BARE,
)  # fmt: skip
EXPERTS = Experts(n_experts=4, top_k=2, d_expert=12, normalized=True)
FAMILIES = {
    "gpt2": PLAIN,  # matrices transposed, queries, keys and values in one
    "neox": mj.models.Config(d_vocab=20, n_ctx=8, d_model=16, n_layers=2, n_heads=4, **NEOX),  # heads in one
    "llama": ROTARY,
    "phi3": ROTARY,  # queries, keys and values of different size in one
    "mixtral": dataclasses.replace(ROTARY, experts=EXPERTS),
}
MESHES = {
    "2x4": {"data": 2, "model": 4},
    "fsdp": {"data": 1, "fsdp": 2, "model": 2},
    "expert": {"data": 2, "expert": 2, "model": 2},
}


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_load__straight_into_a_mesh__has_the_same_bits_split_as_shard_splits(family, mesh, tmp_path):
    export(redrawn(FAMILIES[family]), tmp_path / "model", family=family)
    mesh = mj.make_mesh(**MESHES[mesh])
    expected = mj.load(tmp_path / "model")[0]
    found, split = mj.load(tmp_path / "model", mesh=mesh)[0], mj.shard(expected, mesh)
    assert found.config == expected.config and parameters(found).keys() == parameters(expected).keys()
    for path, x in parameters(found).items():
        assert x.sharding == parameters(split)[path].sharding
        np.testing.assert_array_equal(x, parameters(expected)[path])
    W_O = found.blocks.attn.W_O
    assert {x.data.nbytes for x in W_O.addressable_shards} == {
        W_O.nbytes // (mesh.size // mesh.shape["data"] // mesh.shape.get("expert", 1))
    }


@pytest.mark.parametrize("sizes", [*MESHES.values(), {"data": 2, "sequence": 2, "model": 2}])
@pytest.mark.parametrize("name", ["decoder", "experts"])
def test_forward__on_meshes_of_other_axes__equals_one_device(name, sizes):
    config = FAMILIES["mixtral"] if name == "experts" else dataclasses.replace(SMALL, n_kv_heads=4)
    model, mesh = jax.tree.map(lambda x: x / 2, redrawn(config)), mj.make_mesh(**sizes)
    ids = np.random.default_rng(0).integers(0, 20, (4, 6)).astype(np.int32)
    split = mj.shard(jnp.asarray(ids), mesh, axes="batch pos")
    parts = sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("sequence", 1)
    assert {x.data.size for x in split.addressable_shards} == {ids.size // parts}
    found, acts = mj.capture(mj.shard(model, mesh), ["z", "resid_post"])(split)
    expected, right = mj.capture(model, ["z", "resid_post"])(ids)
    np.testing.assert_allclose(found, expected, **TOL["float32", "mesh"])
    for site in ("z", "resid_post"):
        np.testing.assert_allclose(acts[site], right[site], **TOL["float32", "mesh"])


def test_shard__on_a_users_explicit_mesh__lies_on_its_devices_with_auto_axes():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    found = mj.shard(redrawn(dataclasses.replace(SMALL, n_kv_heads=4)), mesh).blocks.attn.W_Q
    assert found.sharding.mesh.axis_types == (AxisType.Auto,) * 2
    assert (found.sharding.mesh.devices == mesh.devices).all()


@pytest.mark.parametrize(
    ("changes", "sizes", "message"),
    [
        ({"n_heads": 6, "n_kv_heads": 6}, {"data": 2, "model": 4},
         r"`head` has 6, which model=4 devices cannot share equally. Of `head`, 1, 2, 3, 6 devices can"),
        ({"d_mlp": 10, "n_kv_heads": 4}, {"data": 2, "model": 4}, r"`d_mlp` has 10, which model=4.*1, 2, 5, 10 devices"),
        ({"d_model": 9}, {"data": 1, "fsdp": 2, "model": 4}, r"`d_model` has 9, which fsdp=2 devices.*1, 3, 9 devices"),
        ({"experts": Experts(n_experts=3, top_k=2, d_expert=8)} | LLAMA | BARE, {"data": 2, "expert": 2, "model": 2},
         r"`expert` has 3, which expert=2 devices cannot.*1, 3 devices"),
    ],
)  # fmt: skip
def test_shard__a_mesh_that_does_not_divide__says_which_axis_and_what_would_fit(
    changes, sizes, message, tmp_path
):
    config = dataclasses.replace(SMALL, **changes)
    model, mesh = redrawn(config), mj.make_mesh(**sizes)
    with pytest.raises(ArgumentError, match=message):
        mj.shard(model, mesh)
    export(model, tmp_path / "model", family="mechjax")
    with pytest.raises(ArgumentError, match=message):
        mj.load(tmp_path / "model", mesh=mesh)


def test_shard__prompts_that_do_not_fit__says_what_would():
    mesh = mj.make_mesh(data=2, fsdp=2, model=2)
    with pytest.raises(
        ArgumentError, match=r"`batch` has 6, which data=2 x fsdp=2 devices cannot share equally"
    ):
        mj.shard(jnp.zeros((6, 5), jnp.int32), mesh, axes="batch pos")
    with pytest.raises(ArgumentError, match=r"`pos` has 5, which sequence=2 devices cannot.*1, 5 devices"):
        mj.shard(jnp.zeros((4, 5), jnp.int32), mj.make_mesh(data=2, sequence=2, model=2), axes="batch pos")
    with pytest.raises(ShapeError, match=r"axes='batch pos' names 2 axes; an array has the shape \(6,\)"):
        mj.shard(jnp.zeros(6, jnp.int32), mesh, axes="batch pos")


def test_shard__a_mesh_whose_axis_means_nothing__lists_those_that_do(tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "modle"), axis_types=(AxisType.Auto,) * 2)
    message = r"an axis `modle`, and nothing says what it splits: axes are .*Did you mean `model`"
    with pytest.raises(ArgumentError, match=message):
        mj.shard(redrawn(SMALL), mesh)
    export(redrawn(SMALL), tmp_path / "model", family="mechjax")
    with pytest.raises(ArgumentError, match=message):
        mj.load(tmp_path / "model", mesh=mesh)


def test_make_mesh__with_other_axes__has_them_where_they_are_more_than_one():
    assert mj.make_mesh(data=2, fsdp=2, model=2).axis_names == ("data", "fsdp", "model")
    assert dict(mj.make_mesh(sequence=2).shape) == {"data": 4, "sequence": 2, "model": 1}
    assert dict(mj.make_mesh(expert=4, model=2).shape) == {"data": 1, "expert": 4, "model": 2}
    with pytest.raises(
        ArgumentError, match=r"make_mesh\(data=None, fsdp=0, model=1\): sizes must be positive"
    ):
        mj.make_mesh(fsdp=0)
    with pytest.raises(ArgumentError, match=r"8 devices cannot be split into rows of 6"):
        mj.make_mesh(expert=3, model=2)
    with pytest.raises(ArgumentError, match=r"data=4, sequence=2, model=2\) needs 16 devices; 8 are here"):
        mj.make_mesh(data=4, sequence=2, model=2)
