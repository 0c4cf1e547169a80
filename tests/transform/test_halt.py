"""What is said by a program that cannot raise."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

from mechjax.transform.halt import halt_if

NUMBERS = jnp.arange(3)


@eqx.filter_jit
def _halted(x, wrong):
    return halt_if(x, wrong, "that was wrong")


def test_halt_if__on_cpu__raises_what_it_is_told():
    assert (_halted(NUMBERS, jnp.bool_(False)) == NUMBERS).all()
    with pytest.raises(Exception, match="that was wrong"):
        _halted(NUMBERS, jnp.bool_(True))
    with pytest.raises(Exception, match="that was wrong"):
        halt_if(NUMBERS, jnp.bool_(True), "that was wrong")


@pytest.mark.parametrize("dtype", ["int32", "bool", "float32"])
def test_halt_if__for_a_tpu__asks_nothing_of_the_host(dtype):
    run = jax.jit(lambda x, wrong: halt_if(x, wrong, "that was wrong"))
    shapes = jax.ShapeDtypeStruct((3,), dtype), jax.ShapeDtypeStruct((), "bool")
    text = jax.export.export(run, platforms=["tpu"])(*shapes).mlir_module()
    assert "select" in text and "callback" not in text
    expected = {"int32": "2147483647", "bool": "true", "float32": "0x7FC00000"}[dtype]
    assert expected in text
