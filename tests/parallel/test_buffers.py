"""Arrays filled piece by piece: what plain copies give, each device's part, and no byte of others."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mechjax as mj
from mechjax.parallel.buffers import Shards, _copy

SHAPES = [(), (1,), (7,), (300, 17), (1, 513), (64, 3, 130), (5, 2, 70, 33), (400, 400), (2, 1, 300, 129)]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_copy__of_axes_in_any_order__is_what_a_plain_copy_gives(shape, dtype):
    rng = np.random.default_rng(len(shape))
    for order in itertools.permutations(range(len(shape))):
        stored = rng.standard_normal([shape[i] for i in np.argsort(order)]).astype(jnp.dtype(dtype))
        for values in (stored.transpose(order), stored[::-1].transpose(order) if shape else stored):
            to = np.full(values.shape, np.nan, values.dtype)
            _copy(to, values)
            np.testing.assert_array_equal(to, values)


def test_copy__to_another_dtype__rounds_as_numpy_does():
    values = np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32).T
    to = np.empty((200, 300), jnp.bfloat16)
    _copy(to, values)
    np.testing.assert_array_equal(to, values.astype(jnp.bfloat16))


@pytest.mark.parametrize("spec", [("data", "model"), (None, "model"), ("model",), (("data", "model"),), ()])
def test_shards__of_layers_put_one_by_one__are_the_array_as_it_is_split(spec):
    where = NamedSharding(mj.make_mesh(data=2, model=4), PartitionSpec(*spec))
    whole = np.random.default_rng(0).standard_normal((8, 16, 12)).astype(np.float32)
    shards = Shards(whole.shape, whole.dtype, where)
    for layer in range(8):
        shards.put(whole[layer], (layer,))
    found = shards.array()
    assert found.sharding == where
    np.testing.assert_array_equal(found, whole)


class Spied(np.ndarray):
    """An array that remembers which of its numbers somebody asked for."""

    def __getitem__(self, index):
        self.asked[index] = True
        return np.asarray(self)[index]


@pytest.fixture
def only(monkeypatch):
    """Makes some devices those of this process, as where others belong to another."""
    found = NamedSharding.addressable_devices_indices_map

    def of(devices):
        some = lambda self, shape: {d: i for d, i in found(self, shape).items() if d in devices}
        monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", some)

    return of


@pytest.mark.parametrize("n", [1, 4])
def test_shards__of_some_of_the_devices__read_their_own_numbers_alone(n, only):
    mesh = mj.make_mesh(data=2, model=4)
    where = NamedSharding(mesh, PartitionSpec(None, "model", "data"))
    devices = mesh.devices.reshape(-1)[:n]
    parts = where.devices_indices_map((3, 16, 12))
    only(devices)
    shards = Shards((3, 16, 12), np.dtype(np.float32), where)
    for layer in range(3):
        values = np.ones((16, 12), np.float32).view(Spied)
        values.asked = np.zeros(values.shape, bool)
        shards.put(values, (layer,))
        right = np.zeros_like(values.asked)
        for device in devices:
            right[parts[device][1:]] = True
        np.testing.assert_array_equal(values.asked, right)
        assert right.mean() == n / 8


def test_shards__that_are_put_elsewhere__read_nothing(only):
    mesh = mj.make_mesh(data=2, model=4)
    where = NamedSharding(mesh, PartitionSpec("data"))
    only([mesh.devices[0, 0]])
    shards = Shards((4, 6), np.dtype(np.float32), where)
    values = np.ones(6, np.float32).view(Spied)
    values.asked = np.zeros(6, bool)
    shards.put(values, (3,))
    assert not values.asked.any()
