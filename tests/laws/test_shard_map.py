"""Law 5 under `shard_map`, where each device sees its part of an activation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import mechjax as mj
from mechjax.base.errors import SiteError
from tests.laws.subjects import BATCH, LAYERS, SITES, build, reference
from tests.tolerances import TOL

X = jnp.concatenate([BATCH, BATCH * 0.5], 1)[:, :4]  # [batch 2, pos 4, unit]
SPEC = P("data", "model", None)
LAW = TOL["float32", "law"]


@pytest.fixture(scope="module")
def mesh():
    return mj.make_mesh(data=2, model=2)


def mapped(mesh, spec=None, check_vma=True):
    """The function with examples and positions split over devices; nothing crosses either."""
    return jax.shard_map(build(spec=spec), mesh=mesh, in_specs=SPEC, out_specs=SPEC, check_vma=check_vma)


def by_hand(edits=()):
    return [reference(x, edits) for x in X]


def test_shard_map__edit_without_index__needs_no_partition(mesh):
    out = mj.intervene(mapped(mesh), [mj.scale("hidden", 0.5, layer=1)])(X)
    expected = [a["final"] for a in by_hand({("hidden", 1): lambda v: v * 0.5})]
    np.testing.assert_allclose(out, np.stack(expected), **LAW)


@pytest.mark.parametrize(
    "edit", [mj.zero("hidden", pos=1), mj.replace("hidden", np.ones((4, 2)))], ids=["index", "value"]
)
def test_shard_map__index_or_value_without_partition__raises(mesh, edit):
    with pytest.raises(SiteError, match="Declare how it is partitioned"):
        mj.intervene(mapped(mesh), [edit])(X)


def test_shard_map__capture_without_partition__raises(mesh):
    with pytest.raises(SiteError, match="Declare how it is partitioned"):
        mj.capture(mapped(mesh), "hidden")(X)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("pos", [0, 1, 3, -1])
def test_shard_map__with_partition__indices_and_values_are_global(mesh, pos, check_vma):
    value = np.arange(8.0).reshape(4, 2)
    f = mapped(mesh, SPEC, check_vma)
    out, acts = mj.capture(mj.intervene(f, [mj.replace("hidden", value, layer=2, pos=pos)]), SITES)(X)
    hand = by_hand({("hidden", 2): lambda v: v.at[pos].set(value[pos])})
    np.testing.assert_allclose(out, np.stack([a["final"] for a in hand]), **LAW)
    for site in SITES:
        expected = np.stack([[a[site, layer] for a in hand] for layer in range(LAYERS)])
        np.testing.assert_allclose(acts[site], expected, **LAW)


def test_shard_map__position_out_of_the_global_range__raises_or_poisons(mesh):
    f = mapped(mesh, SPEC)
    with pytest.raises(SiteError, match="pos 4 is out of range; site `hidden` has 4"):
        mj.intervene(f, [mj.zero("hidden", pos=4)])(X)
    run = jax.jit(lambda pos: mj.intervene(f, [mj.zero("hidden", pos=pos)])(X))
    assert np.isnan(run(4)).all()
    assert np.isfinite(run(3)).all()


def test_shard_map__gradient_through_edit__equals_one_device(mesh):
    def loss(value, f):
        return (mj.intervene(f, [mj.replace("hidden", value, layer=1, pos=2)])(X) ** 2).sum()

    value = jnp.array([0.3, -0.4])
    actual = jax.grad(loss)(value, mapped(mesh, SPEC))
    expected = jax.grad(loss)(value, jax.vmap(build()))
    np.testing.assert_allclose(actual, expected, **TOL["float32", "gradient"])


def test_auto_mesh__sharded_inputs__give_the_same_numbers(mesh):
    f = jax.vmap(build())
    sharded = jax.device_put(X, jax.NamedSharding(mesh, SPEC))
    edits = [mj.replace("hidden", np.ones(2), layer=2, pos=1)]
    for x in (X, sharded):
        out, acts = mj.capture(mj.intervene(f, edits), "post")(x)
        hand = by_hand({("hidden", 2): lambda v: v.at[1].set(1.0)})
        np.testing.assert_allclose(out, np.stack([a["final"] for a in hand]), **LAW)
    assert "model" in str(acts["post"].sharding.spec)
