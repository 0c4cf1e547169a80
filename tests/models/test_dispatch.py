import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.models import Config
from mechjax.models.dispatch import dispatch
from tests.tolerances import TOL

CONFIG = Config(d_vocab=5, n_ctx=8, d_model=4, n_layers=1, n_heads=1)


@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(1, 16, 4), (5, 3, 2), (70, 4, 1), (33, 16, 8)])
def test_dispatch__every_choice__has_a_row_of_its_own_under_its_expert(n_tokens, n_experts, top_k):
    rng = np.random.default_rng(0)
    indices = np.stack([rng.permutation(n_experts)[:top_k] for _ in range(n_tokens)])
    plan = dispatch(jnp.asarray(indices), n_experts)
    slots = np.asarray(plan.slot)
    assert len(np.unique(slots)) == slots.size
    rows = plan.token.shape[1]
    np.testing.assert_array_equal(np.asarray(plan.expert)[slots // rows], indices)
    held = np.asarray(plan.token).reshape(-1)
    np.testing.assert_array_equal(held[slots], np.broadcast_to(np.arange(n_tokens)[:, None], slots.shape))
    assert (held < n_tokens).sum() == slots.size


def test_dispatch__one_token__reads_the_weights_of_its_experts_alone():
    plan = dispatch(jnp.array([[3, 60, 7, 11]]), 64)
    np.testing.assert_array_equal(plan.expert, [3, 7, 11, 60])


@pytest.mark.parametrize("everywhere", [0, 5])
def test_dispatch__all_tokens_to_one_expert__fit_in_the_blocks(everywhere):
    plan = dispatch(jnp.full((100, 1), everywhere), 6)
    assert (plan.token < 100).sum() == 100


def test_dispatch__mapped_while_weights_are_shared__equals_a_loop():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (4, 9, 6))
    W = jax.random.normal(keys[1], (5, 6, 7))
    indices = jax.random.randint(keys[2], (4, 9, 2), 0, 5)

    def through(x, indices):
        plan = dispatch(indices, 5)
        return plan.collect(plan.multiply(plan.send(x), W, None, CONFIG))

    mapped = jax.jit(jax.vmap(through))(x, indices)
    expected = jnp.einsum("vti,vtkio->vtko", x, W[indices])
    assert_allclose(mapped, expected, **TOL["float32", "parity"])
