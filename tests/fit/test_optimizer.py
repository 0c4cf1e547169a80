import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.fit import adamw


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
