"""Meshes with Explicit axes, which users bring: what is given comes back on them, and nothing else is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mechjax.base.meshes import automatic, on_any_mesh
from mechjax.base.whole import whole


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)


@on_any_mesh
def product(x, W, name="product"):
    """What Explicit axes refuse: both sides split where they are summed over."""
    return {"found": x @ W, "name": name, "numbers": np.ones(2)}


def given(mesh):
    rng = np.random.default_rng(0)
    x, W = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 8), (8, 16)))
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    return x, W, place(x, "data", "model"), place(W, "model")


def test_automatic__of_an_explicit_mesh__has_its_devices(mesh):
    found = automatic(mesh)
    assert found.axis_types == (AxisType.Auto,) * 2 and (found.devices == mesh.devices).all()


@pytest.mark.parametrize("within", [False, True])
def test_on_any_mesh__arrays_of_an_explicit_mesh__come_back_on_it(mesh, within):
    x, W, x_split, W_split = given(mesh)
    with pytest.raises(Exception, match="ambiguous how the output should be sharded"):
        x_split @ W_split
    if within:
        with jax.set_mesh(mesh):
            found = product(x_split, W_split, name="mine")
    else:
        found = product(x_split, W_split, name="mine")
    assert found["found"].sharding.mesh == mesh and found["name"] == "mine"
    assert isinstance(found["numbers"], np.ndarray)
    np.testing.assert_allclose(found["found"], x @ W, rtol=1e-6, atol=1e-6)


def test_on_any_mesh__inside_a_users_jit__is_whole(mesh):
    x, W, x_split, W_split = given(mesh)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda x, W: product(x, W)["found"] * 2)(x_split, W_split)
    np.testing.assert_allclose(found, 2 * (x @ W), rtol=1e-6, atol=1e-6)


def test_on_any_mesh__without_such_a_mesh__is_the_function_itself():
    x = jnp.ones((2, 2))
    seen = []
    on_any_mesh(lambda a: seen.append(a))(x)
    assert seen[0] is x


def test_whole__of_what_is_split__is_all_of_it(mesh):
    x, _, x_split, _ = given(mesh)
    assert isinstance(whole(x_split), np.ndarray)
    np.testing.assert_array_equal(whole(x_split), x)
    assert whole([1, 2], np.float64).dtype == np.float64
