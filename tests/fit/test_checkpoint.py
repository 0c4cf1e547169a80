import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechjax.base.errors import ArgumentError, CheckpointError
from mechjax.fit import log_spaced, restore_checkpoint, save_checkpoint, saved_steps


@given(data=st.data(), steps=st.integers(1, 100_000))
def test_log_spaced__any_run__gives_that_many_steps_in_order(data: st.DataObject, steps: int):
    n = data.draw(st.integers(2, min(steps + 1, 200)))
    chosen = log_spaced(steps, n)
    assert len(chosen) == n
    assert list(chosen) == sorted(set(chosen))
    assert (chosen[0], chosen[-1]) == (0, steps)


def test_log_spaced__ratios__are_even_where_steps_allow():
    chosen = log_spaced(3000, 30)
    assert chosen[:5] == (0, 1, 2, 3, 4)
    ratios = [b / a for a, b in zip(chosen[-9:], chosen[-8:], strict=False)]
    assert max(ratios) / min(ratios) < 1.02


def test_log_spaced__more_than_there_are__is_refused():
    with pytest.raises(ArgumentError, match="12 checkpoints of 10 steps: ask for 2 to 11"):
        log_spaced(10, 12)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("checkpoints")
    models = {step: eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(step)) for step in (10, 2)}
    for step, model in models.items():
        save_checkpoint(folder, step, model)
    return folder, models


def test_restore__a_saved_step__gives_the_same_arrays(saved):
    folder, models = saved
    assert saved_steps(folder) == (2, 10)
    restored = restore_checkpoint(folder, 10, models[2])
    assert eqx.tree_equal(restored, models[10])
    assert restored.activation is models[2].activation


def test_restore__a_step_that_was_not_saved__says_which_were(saved):
    folder, models = saved
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; it has \[2, 10\]"):
        restore_checkpoint(folder, 3, models[2])


def test_restore__another_config__is_refused(saved):
    folder, models = saved
    other = eqx.tree_at(lambda m: m.layers[0].weight, models[2], jnp.zeros((7, 2)))
    with pytest.raises(CheckpointError, match=r"differ in layers\.0\.weight"):
        restore_checkpoint(folder, 10, other)
