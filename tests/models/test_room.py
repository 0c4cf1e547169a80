"""Methods that run out of memory go on with less at once."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mechjax as mj
from mechjax.base.errors import RoomError
from mechjax.models import room
from mechjax.models.room import at_once, backs_off, out_of_memory
from tests.tolerances import TOL

FULL = "RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(room, "_remembered", {})


def method(most, ran):
    """One that has room for `most` at once, and would take 100."""

    @backs_off
    def swept(x, *, chunk_size=None):
        chunk = chunk_size or at_once(1e3, 10)
        ran.append(chunk)
        if chunk > most:
            raise jax.errors.JaxRuntimeError(FULL)
        return x + chunk

    return swept


def test_backs_off__memory_runs_out__halves_until_it_fits_and_remembers():
    ran = []
    swept = method(30, ran)
    assert int(swept(jnp.int32(1))) == 26
    assert ran == [100, 50, 25]
    swept(jnp.int32(1))
    assert ran[3:] == [25]
    assert at_once(1e3, 10) == 100  # outside nothing is halved


@pytest.mark.parametrize(
    ("most", "chosen", "message"),
    [
        (0, None, r"swept ran out of memory. One at a time is too much. Take fewer .*`mj.dry_run`"),
        (10, 64, r"chunk_size=64 is too much: try 32, or leave it out. The device says: RESOURCE_EXHAUSTED"),
        (0, 1, r"chunk_size=1 is too much, though it is one.  Take fewer"),
    ],
)
def test_backs_off__nothing_fits_or_the_caller_chose__says_what_would(most, chosen, message):
    with pytest.raises(RoomError, match=message):
        method(most, [])(jnp.int32(1), chunk_size=chosen)


def test_backs_off__several_processes__tries_nothing_again(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    ran = []
    with pytest.raises(RoomError, match="100 ran at once; processes must agree, so choose: chunk_size=50"):
        method(30, ran)(jnp.int32(1))
    assert ran == [100]


def test_backs_off__other_errors__pass():
    @backs_off
    def swept(error, *, chunk_size=None):
        raise error

    for error in (jax.errors.JaxRuntimeError("INTERNAL: else"), KeyError("x")):
        with pytest.raises(type(error)):
            swept(error)
    assert not out_of_memory(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: No space left on device"))


def test_activation_patch__memory_runs_out__gives_the_same_scores(tiny_model, tiny_tokens, monkeypatch):
    how = {"metric": mj.metrics.logit_diff(1, 2), "site": "z", "over": ("layer", "pos", "head")}
    expected = mj.patching.activation_patch(tiny_model, tiny_tokens, tiny_tokens[::-1], **how)
    module, seen = sys.modules["mechjax.patching.activation_patch"], []
    real = module.all_scores

    def crowded(sweep):
        seen.append(sweep.chunk)
        if sweep.chunk > 10:
            raise jax.errors.JaxRuntimeError(FULL)
        return real(sweep)

    monkeypatch.setattr(module, "all_scores", crowded)
    found = mj.patching.activation_patch(tiny_model, tiny_tokens, tiny_tokens[::-1], **how)
    assert seen[0] > 10 >= seen[-1]
    np.testing.assert_allclose(found.scores, expected.scores, **TOL["float32", "sweep"])
