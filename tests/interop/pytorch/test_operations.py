"""Each operation that we put in JAX ourselves, against torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from mechjax.base.errors import ShapeError, UnsupportedModelError
from mechjax.interop.pytorch.graph import operations
from mechjax.interop.pytorch.operations import OPERATIONS
from tests.interop.pytorch.networks import torch
from tests.tolerances import TOL


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


_Q, _K, _V = _random(2, 4, 3, 8), _random(2, 4, 5, 8, seed=1), _random(2, 4, 5, 6, seed=2)
_BLIND = np.array([[True] * 5, [False] * 5, [True, False, True, False, True]])
_OFFSETS = np.array([2, 2, 5], np.int32)

CASES = {
    "linear": ("aten.linear.default", (_random(2, 3, 4), _random(5, 4, seed=1), _random(5, seed=2)), {}),
    "linear without bias": ("aten.linear.default", (_random(3, 4), _random(5, 4, seed=1)), {}),
    "linear of a vector": ("aten.linear.default", (_random(4), _random(5, 4, seed=1)), {}),
    "matmul": ("aten.matmul.default", (_random(2, 1, 3, 4), _random(5, 4, 2, seed=1)), {}),
    "matmul of vectors": ("aten.matmul.default", (_random(4), _random(4, seed=1)), {}),
    "attention": ("aten.scaled_dot_product_attention.default", (_Q, _K, _V), {}),
    "causal attention": ("aten.scaled_dot_product_attention.default", (_Q, _K, _V), {"is_causal": True, "scale": 0.3}),
    "masked attention": ("aten.scaled_dot_product_attention.default", (_Q, _K, _V, _BLIND), {}),
    "biased attention": ("aten.scaled_dot_product_attention.default", (_Q, _K, _V, _random(3, 5)), {}),
    "grouped attention": ("aten.scaled_dot_product_attention.default", (_Q, _K[:, :2], _V[:, :2]), {"enable_gqa": True}),
    "grouped matmul": ("transformers.grouped_mm_fallback.default", (_random(5, 4), _random(3, 4, 6), _OFFSETS), {}),
    "grouped matmul of many rows": ("transformers.grouped_mm_fallback.default", (_random(300, 4), _random(3, 4, 6), np.array([7, 290, 300], np.int32)), {}),
    "grouped matmul of torch": ("aten._grouped_mm.default", (_random(5, 4), _random(3, 4, 8), _OFFSETS), {}),
    "masked scatter": ("aten.masked_scatter.default", (_random(3, 5), _BLIND, _random(9)), {}),
    "masked scatter over an axis": ("aten.masked_scatter.default", (_random(3, 5), _BLIND[:, :1], _random(15)), {}),
    "whether all are true": ("aten._is_all_true.default", (_BLIND,), {}),
    "alias": ("aten.alias.default", (_random(3),), {}),
    "stop": ("mechjax.stop.default", (_random(3),), {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_operation__of_our_own__is_that_of_torch(case):
    name, args, kwargs = CASES[case]
    operations()
    if name.startswith("transformers"):
        pytest.importorskip("transformers.integrations.moe")
    space, operation, overload = name.split(".")
    own = getattr(getattr(getattr(torch.ops, space), operation), overload)
    tensors = [torch.tensor(x) for x in args]
    expected = own(*tensors, **kwargs)
    with jax.default_matmul_precision("highest"):
        found = OPERATIONS[name](*map(jnp.asarray, args), **kwargs)
    assert_allclose(found, expected, **TOL["float32", "parity"])


def test_masked_scatter__with_too_few_numbers__gives_nan():
    found = OPERATIONS["aten.masked_scatter.default"](jnp.zeros(3), jnp.ones(3, bool), jnp.ones(2))
    assert_array_equal(found, [1, 1, np.nan])


def test_grouped_matmul__mapped_and_differentiated__is_that_of_each():
    grouped = OPERATIONS["aten._grouped_mm.default"]
    x, weight = jnp.asarray(_random(2, 5, 4)), jnp.asarray(_random(3, 4, 6))
    offsets = jnp.array([[2, 2, 5], [0, 4, 5]], jnp.int32)

    def by_hand(x, weight, offsets):
        group = (jnp.arange(5)[:, None] >= offsets).sum(-1)
        return jnp.einsum("nd,ndf->nf", x, weight[group])

    loss = lambda f: lambda x, weight, offsets: (f(x, weight, offsets) ** 2).sum()
    axes, given = (0, None, 0), (x, weight, offsets)
    with jax.default_matmul_precision("highest"):
        assert_allclose(*(jax.vmap(f, axes)(*given) for f in (grouped, by_hand)), **TOL["float32", "parity"])
        grads = (jax.vmap(jax.grad(loss(f), (0, 1)), axes)(*given) for f in (grouped, by_hand))
        jax.tree.map(lambda a, b: assert_allclose(a, b, **TOL["float32", "gradient"]), *grads)


def test_operations__of_sizes__are_numbers():
    x = jnp.zeros((3, 4))
    assert OPERATIONS["aten.sym_size.int"](x, 1) == 4
    assert OPERATIONS["aten.sym_numel.default"](x) == 12
    assert OPERATIONS["aten.sym_constrain_range.default"](3) is None
    assert OPERATIONS["aten._assert_scalar.default"](True, "") is None
    assert OPERATIONS["aten._assert_async.msg"](jnp.zeros((), bool), "") is None
    with pytest.raises(ShapeError, match="does not hold for these sizes: 3 of 4"):
        OPERATIONS["aten._assert_scalar.default"](False, "3 of 4")


def test_attention__that_drops_out__is_refused():
    with pytest.raises(UnsupportedModelError, match=r"dropout_p=0\.1"):
        OPERATIONS["aten.scaled_dot_product_attention.default"](
            *map(jnp.asarray, (_Q, _K, _V)), dropout_p=0.1
        )


def test_attention__with_nothing_to_look_at__has_gradients_that_are_numbers():
    q, k, v, mask = map(jnp.asarray, (_Q, _K, _V, _BLIND))
    attend = OPERATIONS["aten.scaled_dot_product_attention.default"]
    grads = jax.grad(lambda q: (attend(q, k, v, mask) ** 2).sum())(q)
    assert_array_equal(grads[..., 1, :], jnp.zeros_like(grads[..., 1, :]))
    tensors = [torch.tensor(x, requires_grad=x.dtype != bool) for x in (_Q, _K, _V, _BLIND)]
    (torch.nn.functional.scaled_dot_product_attention(*tensors) ** 2).sum().backward()
    assert_allclose(grads, tensors[0].grad, **TOL["float32", "gradient"])
