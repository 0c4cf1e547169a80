"""Counting what crosses between devices, in programs whose collectives are known."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import mechjax as mj
from mechjax.parallel.collectives import collectives


def _text(fn, *specs):
    mesh = mj.make_mesh(data=1, model=8)
    given = [
        jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=NamedSharding(mesh, spec)) for spec in specs
    ]
    return jax.jit(fn).lower(*given).compile().as_text()


def test_collectives__of_loops__are_counted_by_how_many_stand_around_them():
    def chain(x, w):
        inner = lambda x, _: (jnp.sin(x @ w) @ w.T, None)
        outer = lambda x, _: (lax.scan(inner, x, None, length=3)[0], None)
        return lax.scan(outer, x @ w @ w.T, None, length=5)[0]

    found = collectives(_text(chain, P(), P(None, "model")))
    assert found.counts == ({"all-reduce": 1}, {}, {"all-reduce": 1})
    assert found.inner == {"all-reduce": 1}
    assert found.bytes == found.largest == (16 * 16 * 4, 0, 16 * 16 * 4)


def test_collectives__of_a_program_of_one_part__are_none():
    found = collectives(_text(lambda x: x @ x, P()))
    assert found.counts == ({},) and found.inner == {}
    assert found.bytes == (0,)
