import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mechjax.base.errors import ArgumentError
from mechjax.fit import fit


class Line(eqx.Module):
    W: jax.Array
    b: jax.Array
    name: str = eqx.field(static=True, default="line")


def start() -> Line:
    return Line(jnp.zeros(3), jnp.zeros(()))


def loss(model: Line, batch, key):
    x, y = batch
    noise = 1e-3 * jax.random.normal(key, y.shape)
    error = x @ model.W + model.b - y + noise
    return (error**2).mean(), {"bias": model.b}


def batches(seed: int = 0):
    rng = np.random.default_rng(seed)
    while True:
        x = rng.normal(size=(16, 3)).astype(np.float32)
        yield x, x @ np.float32([1, -2, 3]) + np.float32(0.5)


def run(steps: int = 60, key: int = 0, **options):
    return fit(start(), loss, batches(), optax.adam(0.1), steps=steps, key=jax.random.key(key), **options)


def test_fit__a_line__finds_it_and_records_every_step():
    model, history = run()
    np.testing.assert_allclose(model.W, [1, -2, 3], atol=0.2)
    assert history.step.tolist() == list(range(1, 61))
    assert history.metrics["loss"][-1] < 0.05 * history.metrics["loss"][0]
    assert history.metrics["bias"].shape == (60,)


def test_fit__the_callers_model__is_not_donated_away():
    model = start()
    fit(model, loss, batches(), optax.adam(0.1), steps=2, key=jax.random.key(0))
    assert model.W.tolist() == [0, 0, 0]


def test_fit__the_same_key__gives_the_same_bits_however_steps_are_grouped():
    one, other, grouped = run(), run(), run(steps_per_call=7)
    assert eqx.tree_equal(one, other)
    assert eqx.tree_equal(one, grouped)
    assert not eqx.tree_equal(one, run(key=1))


def test_fit__equals_a_plain_loop():
    model, optimizer, key = start(), optax.adam(0.1), jax.random.key(0)
    state = optimizer.init(model)
    for i, batch in enumerate(itertools.islice(batches(), 10)):
        grads = jax.grad(lambda m, b=batch, i=i: loss(m, b, jax.random.fold_in(key, i))[0])(model)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(grads, state)
        model = optax.apply_updates(model, updates)
    fitted, _ = run(steps=10, steps_per_call=4)
    np.testing.assert_allclose(fitted.W, model.W, rtol=1e-6)


def test_fit__checkpoints_between_calls__are_saved_from_one_program():
    def traces(**options) -> int:
        count = []

        def counted(model: Line, batch, key):
            count.append(None)
            return loss(model, batch, key)

        fit(
            start(),
            counted,
            batches(),
            optax.adam(0.1),
            steps=20,
            key=jax.random.key(0),
            steps_per_call=8,
            **options,
        )
        return len(count)

    saved: dict[int, Line] = {}
    assert traces(checkpoints=(0, 1, 3, 20), save=saved.__setitem__) == traces()
    assert list(saved) == [0, 1, 3, 20]
    assert eqx.tree_equal(saved[0], start())
    assert eqx.tree_equal(saved[3], run(steps=3)[0])
    assert eqx.tree_equal(saved[20], run(steps=20)[0])


@pytest.mark.parametrize("options", [{"steps": 0}, {"checkpoints": (61,)}, {"steps_per_call": 0}])
def test_fit__a_run_that_cannot_be__is_refused(options):
    with pytest.raises(
        ArgumentError, match="both numbers must be 1 or more, and every checkpoint from 0 to `steps`"
    ):
        run(**({"steps": 60} | options))


def test_fit__too_few_batches__says_how_many_there_were():
    short = itertools.islice(batches(), 30)
    with pytest.raises(ArgumentError, match="`batches` ended after 30 of 60 steps"):
        fit(start(), loss, short, optax.adam(0.1), steps=60, key=jax.random.key(0))
