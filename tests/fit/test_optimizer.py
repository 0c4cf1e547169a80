import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.fit import adamw, muon
from mechjax.models import Config, init, parameters


def test_adamw__zero_gradients__shrink_weights_and_nothing_else():
    params = {"W_Q": jnp.ones(3), "b_Q": jnp.ones(3), "norm": {"w": jnp.ones(3)}}
    optimizer = adamw(0.1, steps=10, warm_up=0, weight_decay=0.5)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["W_Q"], -0.05, rtol=1e-5)
    assert not updates["b_Q"].any()
    assert not updates["norm"]["w"].any()


def test_adamw__a_warm_up_that_never_ends__is_refused():
    with pytest.raises(ArgumentError, match="warm_up=10 of steps=10"):
        adamw(0.1, steps=10, warm_up=10)


@pytest.mark.slow
def test_muon__updates_of_a_decoder__orthogonal_in_the_blocks_matrices_and_decay_only_them():
    model = init(Config(d_vocab=5, n_ctx=4, d_model=6, n_layers=2, n_heads=2), key=jax.random.key(0))
    optimizer = muon(0.1, steps=10, warm_up=0, weight_decay=0.5)
    keys = iter(jax.random.split(jax.random.key(1), 99))
    gradients = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), model)
    with jax.numpy_dtype_promotion("standard"):
        still, _ = optimizer.update(jax.tree.map(jnp.zeros_like, model), optimizer.init(model), model)
        moved, _ = optimizer.update(gradients, optimizer.init(model), jax.tree.map(jnp.zeros_like, model))
    still, moved, weights = parameters(still), parameters(moved), parameters(model)
    decaying = {
        path for path in weights if path.split(".")[-1] in ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out")
    }
    assert len(decaying) == 6
    for path, update in still.items():
        np.testing.assert_allclose(update, -0.05 * weights[path] if path in decaying else 0, atol=1e-7)
    for path, rows in (("blocks.attn.W_Q", 6), ("blocks.attn.W_O", 6), ("blocks.mlp.W_in", 6)):
        values = np.linalg.svd(np.asarray(moved[path]).reshape(2, rows, -1), compute_uv=False)
        assert values.max() < 2 * values.min()  # five steps of Newton-Schulz leave them within 0.7 to 1.2
    first = 0.1 * (
        0.9 * (1 - 0.9) / (1 - 0.9**2) + 1
    )  # Adam's first step with Nesterov's momentum (Dozat 2016)
    np.testing.assert_allclose(np.abs(moved["W_E"]), first, rtol=1e-3)


def test_muon__a_warm_up_that_never_ends__is_refused():
    with pytest.raises(ArgumentError, match="warm_up=10 of steps=10"):
        muon(0.1, steps=10, warm_up=10, weight_decay=0.0)
