"""Operations counted from a jaxpr, against XLA's count of unrolled programs and against closed forms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

import mechjax as mj
from mechjax.models import Config
from mechjax.transform.cost import cost
from tests.tolerances import TOL


def _shape(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def _by_xla(fn, *args):
    return jax.jit(fn).lower(*args).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda x, y: jnp.einsum("bij,bjk->bik", x, y), (_shape(3, 4, 5), _shape(3, 5, 6))),
        (lambda x, k: lax.conv(x, k, (2, 2), "SAME"), (_shape(2, 3, 8, 8), _shape(4, 3, 2, 2))),
        (
            lambda x, k: lax.conv_general_dilated(x, k, (1,), "VALID", feature_group_count=2),
            (_shape(2, 4, 9), _shape(6, 2, 3)),
        ),
    ],
    ids=["products", "convolution", "grouped convolution"],
)
def test_cost__of_a_contraction__is_xlas(fn, args):
    found = cost(fn, *args)
    assert found.contractions == _by_xla(fn, *args)
    assert found.elementwise == 0


def test_cost__of_a_ragged_product__is_one_matrix_per_row():
    found = cost(lax.ragged_dot, _shape(10, 4), _shape(3, 4, 6), _shape(3, dtype=jnp.int32))
    assert found.contractions == 2 * 10 * 4 * 6


def test_cost__of_a_decoder__is_xlas_count_of_its_layers_unrolled():
    config = Config(d_vocab=100, n_ctx=32, d_model=64, n_layers=6, n_heads=4)

    def unrolled(model, tokens):
        resid, sequence = model.embed(tokens), model.arrange(tokens.shape[-1])
        for layer in range(model.config.n_layers):
            resid = model.block(resid, layer, sequence)
        return model.unembed(resid)

    model = mj.init(config, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_array)
    tokens = _shape(8, 32, dtype=jnp.int32)
    right = _by_xla(lambda a, t: unrolled(eqx.combine(a, static), t), arrays, tokens)
    scanned = _by_xla(lambda a, t: eqx.combine(a, static)(t), arrays, tokens)
    found = cost(model, tokens)
    np.testing.assert_allclose(found.flops, right, **TOL["any", "operations"])
    assert scanned < 0.3 * right  # XLA's own count of the loop is of no use
    assert found.unknown == ()


def test_cost__of_loops_and_branches__counts_what_runs():
    w = _shape(8, 8)
    one = 2 * 8**3

    def scanned(w):
        return lax.scan(lambda x, _: (x @ w, None), w, None, length=7)[0]

    def nested(w):
        return lax.scan(lambda x, _: (jax.checkpoint(jax.jit(scanned))(x), None), w, None, length=3)[0]

    assert cost(scanned, w).contractions == 7 * one
    assert cost(nested, w).contractions == 21 * one
    assert cost(lambda w: lax.fori_loop(0, 5, lambda _, x: x @ w, w), w).contractions == 5 * one
    branches = [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x]
    assert cost(lambda i, w: lax.switch(i, branches, w), _shape(dtype=jnp.int32), w).contractions == 2 * one
    assert cost(jax.grad(lambda w: (w @ w).sum()), w).contractions == 3 * one


def test_cost__of_shard_map__counts_every_device():
    mesh = mj.make_mesh(data=2, model=4)
    split = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(PartitionSpec("data"), PartitionSpec(None, "model")),
        out_specs=PartitionSpec("data", "model"),
    )  # fmt: skip
    assert cost(split, _shape(4, 8), _shape(8, 8)).contractions == 2 * 4 * 8 * 8


def test_cost__of_what_cannot_be_known__is_named():
    found = cost(lambda w: lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, w), _shape(4, 4))
    assert found.unknown == ("a while loop, whose body is counted once",)
    assert found.contractions == 2 * 4**3
    assert cost(jnp.linalg.cholesky, _shape(4, 4)).unknown == ("`cholesky`, which is not counted",)


def test_cost__of_a_kernel__is_what_its_author_says():
    from jax.experimental import pallas as pl

    def double(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    def kernel(x, estimate=None):
        return pl.pallas_call(double, out_shape=x, cost_estimate=estimate)(x)

    stated = pl.CostEstimate(flops=123, transcendentals=4, bytes_accessed=9)
    assert cost(lambda x: kernel(x, stated), _shape(8, 8)).flops == 127
    assert cost(kernel, _shape(8, 8)).unknown == ("`pallas_call`, which is not counted",)


def test_cost__of_integers_and_of_movement__is_nothing():
    found = cost(lambda i, x: (i * 2 + i, x.T.reshape(-1)[::-1]), _shape(9, dtype=jnp.int32), _shape(3, 3))
    assert (found.flops, found.unknown) == (0, ())
    assert cost(lambda x: jnp.exp(x + x).sum(), _shape(9)).elementwise == 3 * 9


def test_cost__peak__is_what_is_alive_at_once():
    size = 4 * 16 * 16

    def diamond(x):
        a = x @ x
        b = a @ x
        return a @ b  # a, b and the result are alive; x is an argument

    assert cost(diamond, _shape(16, 16)).peak_bytes == 3 * size
    assert cost(lambda x: diamond(x) @ x @ x @ x, _shape(16, 16)).peak_bytes == 3 * size
    stacked = cost(lambda x: lax.scan(lambda c, _: (c @ x, c), x, None, length=5), _shape(16, 16))
    assert stacked.peak_bytes == (5 + 1 + 1) * size  # five rows, the last carry, the next one


def test_cost__counting__makes_no_array(tiny_model):
    before = len(jax.live_arrays())
    shapes = jax.tree.map(lambda x: _shape(*x.shape, dtype=x.dtype), tiny_model)
    assert cost(shapes, _shape(1 << 20, 16, dtype=jnp.int32)).flops > 1e11
    assert len(jax.live_arrays()) == before
