"""Training on a mesh: the same dictionary as on one device, with a part of every matrix on each."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mechjax as mj
from mechjax.base.errors import ArgumentError, ShapeError
from mechjax.dictionaries.largest import largest_of_all, largest_of_each
from mechjax.dictlearn import train, train_many
from mechjax.dictlearn.loop import advance
from mechjax.dictlearn.placement import placed
from mechjax.dictlearn.plan import UNIT_ADAM, planned
from mechjax.dictlearn.step import begun
from tests.dictionaries.kinds import KINDS, D, F, drawn, tokens
from tests.dictlearn import apart
from tests.needs import CHIPS
from tests.tolerances import TOL

KEY, MESH = jax.random.key(0), TOL["float32", "mesh"]
QUICK = ("top_k, multi", "batch_top_k", "jump_relu")


@pytest.fixture(scope="module")
def mesh():
    return mj.make_mesh(data=2, model=4)


def run(dictionary, mesh, **more):
    return train(
        dictionary, [tokens(i, 16) for i in range(6)], steps=6, learning_rate=1e-3, key=KEY, steps_per_call=3,
        dead_after=40, mesh=mesh, **more,
    )  # fmt: skip


def same(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), **MESH)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KINDS]
)
def test_train__on_a_mesh__gives_the_dictionary_of_one_device(name, mesh):
    alone, shared = run(drawn(name), None), run(drawn(name), mesh)
    same(alone.dictionary, shared.dictionary)
    same(alone.history, shared.history)
    np.testing.assert_array_equal(alone.silent, shared.silent)
    assert len(shared.dictionary.W_dec.sharding.device_set) == 8


@pytest.mark.slow
def test_train_many__on_a_mesh__gives_the_dictionaries_of_one_device(mesh):
    several = [drawn("top_k", seed=seed) for seed in range(2)]
    given = [tokens(i, 16) for i in range(4)]
    how = {"steps": 4, "learning_rate": 1e-3, "steps_per_call": 2}
    for alone, shared in zip(
        train_many(several, given, **how), train_many(several, given, mesh=mesh, **how), strict=True
    ):
        same(alone.dictionary, shared.dictionary)


def test_step__on_a_mesh__leaves_a_quarter_of_every_matrix_on_each_device_and_gathers_none(mesh):
    plan = planned(10, 2, 1e-3, 0, 0.3, 0.0, None, 40, None, True)
    dictionary = drawn("top_k")
    state = placed(begun(dictionary, UNIT_ADAM), UNIT_ADAM, mesh)
    x = jax.device_put(jnp.stack([tokens(0, 16), tokens(1, 16)]), NamedSharding(mesh, P(None, "data")))
    given = ((plan, jnp.ones(2), jnp.int32(0), (x, None)), state)
    with jax.set_mesh(mesh):
        text = advance.lower(*given).compile().compiled.as_text()
        state, _ = advance(*given)
    matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert len(matrices) == 6  # encoder and decoder, each with two moments
    for leaf in matrices:
        assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 4}
    assert f"[{F},{D}]" not in text and "all-reduce" in text  # nowhere is there a whole matrix


def test_largest__on_a_mesh__is_what_one_device_finds_to_the_bit(mesh):
    z = jnp.round(jax.random.normal(KEY, (8, 64)), 1)  # with many ties
    split = jax.device_put(z, NamedSharding(mesh, P("data", "model")))
    expected = largest_of_all(z, 100)
    with jax.set_mesh(mesh):
        found = jax.jit(largest_of_all, static_argnums=1)(split, 100)
        text = jax.jit(largest_of_all, static_argnums=1).lower(split, 100).compile().as_text()
    np.testing.assert_array_equal(found, expected)
    assert "f32[8,64]" not in text and "f32[4,64]" not in text  # latents are not brought together


@pytest.mark.parametrize(("shape", "k"), [((32, 64), 5), ((7, 64), 5), ((4, 4096), 8)])
def test_largest_of_each__with_ties__is_top_k(shape, k):
    z = jnp.round(jax.random.normal(KEY, shape), 1)
    for one, two in zip(largest_of_each(z, k), jax.lax.top_k(z, k), strict=True):
        np.testing.assert_array_equal(one, two)


def test_train__on_a_mesh_that_does_not_divide__says_what_would(mesh):
    with pytest.raises(
        ArgumentError, match=r"model=4 devices, and n_features=90 cannot be split so: .*may be 1, 2"
    ):
        run(mj.dictionaries.TopK.init(d_model=D, n_features=90, k=4, key=KEY), mesh)
    with pytest.raises(ShapeError, match="data=2 devices, and batches have 15 tokens: give a multiple of 2"):
        train(drawn("top_k"), [tokens(0, 15)], steps=1, learning_rate=1e-3, key=KEY, mesh=mesh)
    with pytest.raises(
        ArgumentError, match=r"the mesh has axes \('rows',\); training needs `data` and `model`"
    ):
        run(drawn("top_k"), jax.make_mesh((8,), ("rows",)))


@pytest.mark.slow
def test_train__in_two_processes__gives_the_dictionary_of_one(tmp_path):
    codes, said = apart.two_processes(tmp_path / "found.npz")
    assert codes == [0, 0], said
    alone, found = apart.trained(None), np.load(tmp_path / "found.npz")
    for name in ("W_enc", "W_dec", "b_dec", "threshold"):
        np.testing.assert_allclose(found[name], getattr(alone.dictionary, name), **MESH)
    np.testing.assert_allclose(found["loss"], alone.history["loss"], **MESH)


@pytest.mark.slow
def test_train__a_process_of_two_dies__the_other_says_where_to_go_on_and_both_do(tmp_path):
    code, seconds, said = apart.after_a_death(tmp_path / "run")
    assert code != 0
    assert seconds < apart.HEARTBEAT + 10  # a busy machine
    assert f"What was kept lies in `{tmp_path / 'run'}`: start all processes again as before" in said
    kept = mj.fit.saved_steps(tmp_path / "run")
    assert kept and max(kept) < apart.LONG
    found, said = apart.digest_of_two(tmp_path / "run")
    assert found, said
    assert found == apart.digest_of_two(tmp_path / "unbroken")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(None, (4, 2)), ((2, 4), None), ((2, 4), (4, 2))])
def test_train__taken_up_on_another_mesh__comes_to_the_same(first, then, tmp_path):
    first, then = (None if s is None else mj.make_mesh(data=s[0], model=s[1]) for s in (first, then))
    with contextlib.suppress(ArgumentError):
        apart.trained(first, tmp_path / "run", stop=5)  # batches end early
    assert mj.fit.saved_steps(tmp_path / "run") == (3,)
    same(apart.trained(then, tmp_path / "run").dictionary, apart.trained(None).dictionary)


@pytest.mark.slow
@CHIPS
def test_step__for_eight_described_chips__compiles_and_gathers_no_latents():
    found, said = apart.compiled_for_tpu()
    assert found.keys() == {"TopK", "BatchTopK", "JumpReLU"}, said
    for gathered, sums in found.values():
        assert gathered < 512 * 4096 // 8 and sums > 0
