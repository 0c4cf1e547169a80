import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mechjax as mj
from mechjax.models import Config, assemble, parameters


def test_init__same_key__gives_the_same_bits_in_the_dtype_asked_for(tiny_config):
    first, again = (mj.init(tiny_config, key=jax.random.key(4)) for _ in range(2))
    for path, array in parameters(first).items():
        np.testing.assert_array_equal(array, parameters(again)[path])
    half = mj.init(tiny_config, key=jax.random.key(4), dtype=jnp.bfloat16)
    assert {array.dtype for array in parameters(half).values()} == {jnp.dtype(jnp.bfloat16)}


def test_init__scales__are_those_of_gpt2():
    config = Config(d_vocab=500, n_ctx=64, d_model=64, n_layers=8, n_heads=4, tied=False)
    params = parameters(mj.init(config, key=jax.random.key(0)))
    for path, array in params.items():
        name = path.rpartition(".")[2]
        if name == "w":
            assert (array == 1).all()
        elif name.startswith("b"):
            assert (array == 0).all()
        else:
            assert array.std() == pytest.approx(0.02 / (4 if name in ("W_O", "W_out") else 1), rel=0.05)


def test_assemble__of_parameters__is_the_model(tiny_model):
    again = assemble(tiny_model.config, parameters(tiny_model))
    assert jax.tree.structure(again) == jax.tree.structure(tiny_model)


def test_training__ten_lines_of_optax__lower_the_loss():
    model = mj.init(Config(d_vocab=16, n_ctx=12, d_model=32, n_layers=2, n_heads=2), key=jax.random.key(0))
    half = jax.random.randint(jax.random.key(1), (32, 6), 0, 16)
    tokens = jnp.concatenate([half, half], 1)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(model)

    @jax.jit
    def step(model, state):
        def loss(model):
            return optax.softmax_cross_entropy_with_integer_labels(
                model(tokens)[:, :-1], tokens[:, 1:]
            ).mean()

        value, grads = jax.value_and_grad(loss)(model)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(model, updates), state, value

    losses = []
    with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
        for _ in range(60):
            model, state, value = step(model, state)
            losses.append(float(value))
    assert losses[0] > 2.5
    assert losses[-1] < 0.6 * losses[0]
