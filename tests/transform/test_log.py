"""The compile log: why a program was compiled."""

import jax.numpy as jnp

import mechjax as mj
from mechjax.transform.log import compile_log


def test_log__captures_that_differ_in_reduce_alone__are_told_apart():
    def model(x):
        return mj.site(x, "resid", axes=("batch", "pos", "d")) * 2.0

    x = jnp.ones((2, 3, 4))
    compile_log(clear=True)
    for reduce in (None, lambda x, info: x.max(-1), lambda x, info: x.min(-1)):
        mj.capture(model, "resid", reduce=reduce)(x)
    reasons = [entry.reason for entry in compile_log()]
    assert reasons == ["new function", "new sites", "new sites"]
