"""Both kernels' functions against loops: splash as plain JAX, cuDNN's by the implementation of XLA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose

from mechjax.models.fused import fused
from mechjax.models.kernels import cudnn, splash
from mechjax.models.positions import arrange
from tests.models.kernels.by_hand import POS, REAL, config_of, inputs_of, mixed, weights_of
from tests.tolerances import TOL

KERNELS = {
    "splash": partial(splash.mixed, interpret=True),
    "cudnn": partial(cudnn.mixed, implementation="xla"),
}
CASES = {
    "causal": ({}, None, None),
    "padding on both sides": ({}, None, REAL),
    "window, grouped keys": ({"n_kv_heads": 2}, 20, None),
    "window, padding, scale": ({"attn_scale": 0.7}, 20, REAL),
    "soft-cap, one key head": ({"attn_softcap": 2.0, "n_kv_heads": 1}, None, REAL),
}
GRADIENTS = {
    ("splash", "window, padding, scale"),
    ("splash", "soft-cap, one key head"),
    ("cudnn", "window, padding, scale"),
}
ALL = [
    (kernel, name) for kernel in KERNELS for name in CASES if not (kernel == "cudnn" and "soft-cap" in name)
]
SOME = [pytest.param(*case, marks=[pytest.mark.slow] * (case not in GRADIENTS)) for case in ALL]


@pytest.mark.parametrize(("kernel", "name"), ALL)
def test_mixed__of_real_tokens__is_a_softmax_by_loops(kernel, name):
    choices, window, real = CASES[name]
    config = config_of(**choices)
    q, k, v = inputs_of(config)
    mask = None if real is None else jnp.asarray(real)
    z = jax.jit(partial(KERNELS[kernel], config, window, mask))(q, k, v)
    shown = np.ones((2, POS), bool) if real is None else real
    assert_allclose(z[shown], mixed(config, window, real, q, k, v)[shown], **TOL["float32", "parity"])
    assert jnp.isfinite(z).all()  # nothing is born in padding


@pytest.mark.parametrize(("kernel", "name"), SOME)
def test_mixed__its_gradients__are_those_of_plain_xla(kernel, name):
    choices, window, real = CASES[name]
    config = config_of(**choices, windows=None if window is None else (window,) * 2)
    args = inputs_of(config)
    mask = None if real is None else jnp.asarray(real)
    places = arrange(config, POS, mask, None).queries
    weights = weights_of(args[0], real)
    sides = (places, places, None if window is None else jnp.int32(window))
    plain = lambda q, k, v: (fused(q, k, v, sides, None, config) * weights).sum()
    kernel_of = lambda q, k, v: (KERNELS[kernel](config, window, mask, q, k, v) * weights).sum()
    theirs = jax.jit(jax.grad(plain, (0, 1, 2)))(*args)
    for a, b in zip(jax.jit(jax.grad(kernel_of, (0, 1, 2)))(*args), theirs, strict=True):
        assert_allclose(a, b, **TOL["float32", "gradient"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_mixed__of_more_batch_axes_and_of_none__is_that_of_each(kernel):
    config, f = config_of(), KERNELS[kernel]
    q, k, v = inputs_of(config, batch=(2, 2))
    real = jnp.asarray(REAL)[:, None]  # as a mapped axis leaves it
    z = jax.jit(partial(f, config, None, real))(q, k, v)
    one = jax.jit(partial(f, config, None, real[1, 0]))(q[1, 1], k[1, 1], v[1, 1])
    assert_allclose(z[1, 1], one, **TOL["float32", "parity"])


def test_splash__values_of_another_width_and_a_text_of_many_blocks__are_as_by_loops():
    config = config_of()
    q, k, v = inputs_of(config, batch=(1,), n_pos=512, d_value=5)
    z = jax.jit(partial(KERNELS["splash"], config, 300, None))(q, k, v)
    assert_allclose(z, mixed(config, 300, None, q, k, v), **TOL["float32", "parity"])
